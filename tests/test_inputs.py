"""Rules for rows: what is refused, and what is left out."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import make_tokenizer
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig

from apo_trl import APOConfig
from apo_trl.config import check_config
from apo_trl.datasets.preprocessing import normalise_datasets
from apo_trl.errors import InputError, InvalidRow, nearest
from apo_trl.io import run_record
from apo_trl.io.rows import degenerate_reason, normalise_row
from apo_trl.training.arguments import check_paths, parse
from apo_trl.training.movement import loses_updates


def says(text):
    return [{"role": "assistant", "content": text}]


GOOD = {"prompt": [{"role": "user", "content": "Hi"}], "chosen": says("Hello."), "rejected": says("No.")}


@pytest.mark.parametrize(
    "row",
    [
        GOOD,
        {"prompt": "Hi", "chosen": " Hello.", "rejected": " No."},
        {"chosen": GOOD["prompt"] + says("Hello."), "rejected": GOOD["prompt"] + says("No.")},
        {**GOOD, "chosen": [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]},
        {"prompt": "", "chosen": "a", "rejected": "b"},
        GOOD | {"prompt": "Hi"},
    ],
)
def test_good_rows(row):
    normal = normalise_row(row)
    assert normalise_row(normal) == normal


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chosen": None}, "no 'chosen'"),
        ({"rejected": None}, "no 'rejected'"),
        ({"prompt": None}, "no 'prompt'"),
        ({"chosen": 3}, "int as 'chosen'"),
        ({"chosen": ["a"]}, "list of str as 'chosen'"),
        ({"chosen": [{"content": "a"}]}, "without 'role' in 'chosen'"),
        ({"prompt": []}, "empty list as 'prompt'"),
        ({"chosen": "text"}, "string as 'chosen' beside a list of messages"),
        ({"prompt": "text", "chosen": "text"}, "string as 'chosen' and 'prompt' beside a list of messages"),
    ],
)
def test_bad_rows_are_named(change, words):
    with pytest.raises(InvalidRow, match=words):
        normalise_row(GOOD | change)


@pytest.mark.parametrize("wins", [0, 1, 0.5, 1.0])
def test_good_chosen_wins(wins):
    assert normalise_row({**GOOD, "chosen_wins": wins}, needs_wins=True)["chosen_wins"] == wins


@pytest.mark.parametrize("wins", [None, True, "0.5", math.nan, -0.01, 1.01, math.inf])
def test_bad_chosen_wins(wins):
    with pytest.raises(InvalidRow, match="chosen_wins"):
        normalise_row({**GOOD, "chosen_wins": wins}, needs_wins=True)
    assert normalise_row({**GOOD, "chosen_wins": wins})  # no loss reads it


def test_the_first_bad_row_is_numbered():
    rows = [GOOD, GOOD, GOOD | {"rejected": None}, GOOD | {"rejected": None}]
    with pytest.raises(InputError, match=r"^Row 2 of the train dataset has no 'rejected'"):
        normalise_datasets(Dataset.from_list(rows), "train")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"chosen": "choosen"}, "the unknown column 'choosen'. Did you mean 'chosen'"),
        ({"rejected": "rejcted"}, "the unknown column 'rejcted'. Did you mean 'rejected'"),
        ({"prompt": "promt"}, "the unknown column 'promt'. Did you mean 'prompt'"),
        ({"prompt": "question"}, "the unknown column 'question'. Did you mean 'prompt'"),
        ({"prompt": "question", "chosen": "answer", "rejected": None}, "Single answers: build pairs of them"),
        ({"prompt": None, "chosen": "messages", "rejected": None}, "Single answers: build pairs of them"),
        ({"chosen": "completion", "rejected": "label"}, "use the recipe qwen3-0.6b/kto_apo_zero_unpaired"),
        ({"chosen": "first", "rejected": "second"}, "no column 'chosen'; its columns are"),
    ],
)
def test_a_column_of_another_name(columns, words):
    row = {"prompt": "Capital?", "chosen": " Rome.", "rejected": " Paris."}
    row = {columns.get(name, name): text for name, text in row.items()}
    row.pop(None, None)
    with pytest.raises(InputError, match=re.escape(words)):
        normalise_datasets(Dataset.from_list([row]), "train")
    with pytest.raises(InvalidRow, match=re.escape(words)):
        normalise_row(row)


@pytest.mark.parametrize("config_class", [APOConfig, DPOConfig])
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"beta": "0.1"}, "beta: must be a valid number, got '0.1'. Change it, without quotes"),
        ({"beta": None}, "beta: must be a valid number"),
        ({"beta": 0}, "beta: must be greater than 0"),
        ({"beta": math.nan}, "beta: must be"),
        ({"beta": math.inf}, "beta: must be"),
        ({"learning_rate": "1e-5"}, "learning_rate: must be a valid number"),
        ({"learning_rate": -1.0}, "learning_rate: must be greater than or equal to 0"),
        ({"label_smoothing": 0.5}, "label_smoothing: must be less than 0.5"),
        ({"loss_weights": ["1"]}, "loss_weights: must be a valid number"),
        ({"loss_weights": 1.0}, "loss_weights: must be a valid list"),
        ({"loss_weights": [math.nan]}, "loss_weights: must be a finite number"),
        ({"max_length": 0}, "max_length: must be greater than 0"),
        ({"padding_free": "false"}, "padding_free: must be a valid boolean"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: must be greater than 0"),
        ({"num_train_epochs": "three"}, "num_train_epochs: must be a valid number"),
    ],
)
def test_a_value_of_the_wrong_type_or_out_of_bounds(config_class, settings, words, tmp_path):
    config = config_class(tmp_path, use_cpu=True)
    for name, value in settings.items():
        setattr(config, name, value)
    with pytest.raises(InputError, match="^" + re.escape(words)):
        check_config(config)
    if config_class is APOConfig:
        with pytest.raises(InputError, match="^" + re.escape(words)):
            APOConfig(tmp_path, use_cpu=True, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 1},
        {"beta": np.float32(0.1)},
        {"seed": np.int64(3)},
        {"max_length": None},
        {"max_grad_norm": math.inf},
        {"max_grad_norm": -1},
        {"fp16": np.bool_(False)},
        {"fp16": None},
        {"loss_weights": (1.0,)},
    ],
    ids=str,
)
def test_other_spellings_of_a_number(settings, tmp_path):
    APOConfig(tmp_path, use_cpu=True, **settings)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dpo", "Did you mean 'sigmoid'"),
        ("apo", "Did you mean 'apo_zero'"),
        ("APO-Zero", "Did you mean 'apo_zero'"),
        ("bco", "Did you mean 'bco_pair'"),
        ("kto", "use the recipe qwen3-0.6b/kto_apo_zero_unpaired"),
        ("orpo", "not a loss of TRL's DPOTrainer"),
    ],
)
def test_usual_names_of_losses(name, words, tmp_path):
    with pytest.raises(InputError, match=f"loss_type: '{name}' is unknown.*{words}"):
        APOConfig(tmp_path, use_cpu=True, loss_type=name)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr("apo_trl.config.is_torch_bf16_gpu_available", lambda: False)
    monkeypatch.setattr("torch.accelerator.is_available", lambda *_: False)


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_the_default_bfloat16_is_off(tmp_path, caplog):
    assert APOConfig(tmp_path).bf16 is False
    assert [record.message for record in caplog.records if "bf16 is off" in record.message]
    assert APOConfig(tmp_path, use_cpu=True).bf16  # as TRL does it
    with pytest.raises(InputError, match=r"^bf16: requires a GPU.*Remove it"):
        APOConfig(tmp_path, bf16=True)


@pytest.mark.parametrize(
    ("dtype", "lora", "warns"), [("bfloat16", False, True), ("bfloat16", True, False), ("float32", False, False)]
)
def test_whole_weights_in_bfloat16_are_warned_of(train, dtype, lora, warns):
    adapter = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    trainer = train(run=False, model_init_kwargs={"dtype": dtype}, peft_config=adapter)
    assert loses_updates(trainer).startswith("dtype: ") == warns


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("options", [[], ["--bf16", "true"], ["--tf32", "true"], ["--fp16", "true"]], ids=" ".join)
def test_without_a_gpu_the_command_runs_on_the_cpu(options, tmp_path, caplog):
    caplog.set_level("INFO", "apo_trl")
    flash = ["--attn_implementation", "flash_attention_2"]
    run, _ = parse([*options, *flash, "--output_dir", str(tmp_path)])
    training = run.training
    assert (training.use_cpu, training.bf16, training.fp16, bool(training.tf32)) == (True, False, False, False)
    assert run.model.attn_implementation == "sdpa"
    (line,) = [record.message for record in caplog.records if record.name == "apo_trl.config.cpu"]
    assert line.startswith("No GPU found, training on the CPU")


@pytest.mark.parametrize(("folder", "fault"), [("file", "is a file"), ("file/below", "is a file")])
def test_an_output_folder_that_is_a_file(train, tmp_path, folder, fault):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=f"^output_dir: .*file {fault}"):
        train(output_dir=str(tmp_path / folder), run=False)


def test_a_model_folder_that_is_missing(train, model_dir):
    with pytest.raises(InputError, match=rf"^model: folder not found.*Did you mean '{re.escape(str(model_dir))}'"):
        train(model=f"{model_dir}x", run=False)


def test_the_packaged_model_by_its_name(train, model_dir, monkeypatch):
    monkeypatch.setattr("apo_trl.models.packaged.smollm2", lambda: model_dir)
    assert train(model="SmolLM2-135M-Instruct", run=False).model.config._name_or_path == str(model_dir)


def test_messages_without_a_chat_template(train):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(InputError, match=r"processing_class: no chat template.*-Instruct model"):
        train(processing_class=tokenizer, run=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dataset_name", "paris.jsonl"], "dataset_name: file paris.jsonl not found. Did you mean 'pairs.jsonl'"),
        (["--dataset_name=./paris"], "dataset_name: file not found"),
        (["--dataset_name", "pairs.csv"], "dataset_name: format not supported"),
        (["--model_name_or_path", "./modle"], "model_name_or_path: folder not found, got './modle'. Did you mean"),
    ],
)
def test_paths_are_checked_first(options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("pairs.jsonl", "pairs.csv", "model"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match="^" + re.escape(words)):
        check_paths(options)


class TestRunRecord:
    def record(self, trainer):
        return json.loads(Path(trainer.args.output_dir, "run.json").read_text())

    def test_any_trainer_writes_it_without_keys(self, train):
        trainer = train(steps=1, hub_token="secret", model_init_kwargs={"token": "secret"})
        record = self.record(trainer)
        assert {"model", "dataset", "settings", "versions", "date", "device"} == record.keys()
        settings = record["settings"]
        assert (settings["loss_type"], settings["beta"], settings["learning_rate"]) == (["apo_zero"], 0.1, 1e-3)
        assert settings["precision"] == "float32, no autocast"
        assert "8 rows" in record["dataset"]
        assert "secret" not in json.dumps(record)

    def test_settings_that_json_cannot_sort_or_hold(self, train):
        trainer = train(steps=1, model_init_kwargs={"device_map": "cpu", "max_memory": {0: "1GiB", "cpu": "1GiB"}})
        assert self.record(trainer)["settings"]["model_init_kwargs"]["max_memory"] == {"0": "1GiB", "cpu": "1GiB"}

    def test_a_package_that_is_not_installed_has_no_version(self, train, monkeypatch):
        """A folder of its name, such as deepspeed/ with settings, is found as a package."""
        without = [name for name in run_record._PACKAGES if name != "deepspeed"]
        monkeypatch.setattr(run_record, "_PACKAGES", (*without, "no-such-package"))
        versions = self.record(train(steps=1))["versions"]
        assert versions.keys() == {*without, "python"}

    def test_evaluation_alone_writes_none(self, train, dataset):
        trainer = train(run=False, eval_dataset=dataset)
        trainer.evaluate()
        assert not Path(trainer.args.output_dir, "run.json").exists()


def test_no_rows():
    with pytest.raises(InputError, match="has no rows"):
        normalise_datasets(Dataset.from_list([GOOD]).select([]), "eval")


def test_nearest():
    assert nearest("apo_zro", ["apo_zero", "sigmoid"]) == " Did you mean 'apo_zero'?"
    assert nearest("qqqq", ["apo_zero", "sigmoid"]) == ""


USER, OTHER = {"role": "user", "content": "Hi"}, {"role": "user", "content": "And now?"}


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        (says("Yes."), says("No."), [USER]),  # answers alone: the text is the user's message
        ([USER, *says("Yes.")], [USER, *says("No.")], [USER]),  # whole conversations
        ([USER, *says("Well."), OTHER, *says("Yes.")], [USER, *says("Well."), OTHER, *says("No.")],
         [USER, *says("Well."), OTHER]),
        (says("Same."), says("Same."), [USER]),
        ([USER, *says("Same.")], [USER, *says("Same.")], [USER]),
        ([], says("No."), [USER]),
    ],
)  # fmt: skip
def test_a_text_beside_two_conversations(chosen, rejected, prompt):
    got = normalise_row({"prompt": "Hi", "chosen": chosen, "rejected": rejected})
    assert got == {"prompt": prompt, "chosen": chosen[-1:] or says(""), "rejected": rejected[-1:]}


def tokens(prompt, chosen, rejected):
    return {**GOOD, "prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}


@pytest.mark.parametrize(
    ("row", "settings", "reason"),
    [
        (GOOD, {}, None),
        (GOOD | {"chosen": GOOD["rejected"]}, {}, "chosen equals rejected"),
        (GOOD | {"chosen": says(" \n")}, {}, "a completion is empty"),
        (GOOD | {"rejected": []}, {}, "a completion is empty"),
        (GOOD | {"chosen": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]}, {}, None),
        ({"prompt": "a", "chosen": "</s>", "rejected": "b</s>"}, {"eos_token": "</s>"}, "a completion is empty"),
        (tokens([1, 2], [3, 4], [3, 5]), {}, None),
        (tokens([1, 2], [3, 4], [3, 4]), {}, "chosen equals rejected as tokens"),
        (tokens([1, 2], [], [3]), {}, "a completion is empty"),
        (tokens([1, 2], [3, 4], [3, 5]), {"max_length": 4}, None),
        (tokens([1, 2], [3, 4], [3, 5]), {"max_length": 3}, "chosen equals rejected after truncation to max_length=3"),
        (tokens([1, 2], [3, 9], [5, 9]), {"max_length": 2, "keep_end": True}, None),
        (
            tokens([1, 2], [3, 9], [5, 9]),
            {"max_length": 1, "keep_end": True},
            "chosen equals rejected after truncation to max_length=1",
        ),
    ],
)
def test_useless_pairs_have_a_reason(row, settings, reason):
    assert degenerate_reason(row, **settings) == reason
