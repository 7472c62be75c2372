"""`apo-trl evaluate`: log-probs against raw logits, for whole models, adapters and merged ones; intervals; refusals."""

import json
import math
import os
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import transformers
from conftest import make_model, make_tokenizer, rows
from test_cli import write

from apo_trl.cli import main as cli
from apo_trl.errors import InputError
from apo_trl.evaluation.evaluate import evaluate, summarise, table
from apo_trl.evaluation.intervals import mean_interval, probability_between, wilson
from apo_trl.evaluation.regimes import regime
from apo_trl.metrics import pair_metrics
from apo_trl.models.loading import find_model, load_config, load_policy, load_tokenizer
from apo_trl.models.merge import merge
from apo_trl.models.packaged import MODEL_NAME
from apo_trl.training.movement import hardly_moved, hardly_moved_by_log, movement_of

TEXTS = [
    {"prompt": "Two and two", "chosen": " are four", "rejected": " are five, I think"},
    {"prompt": "Name a colour:", "chosen": " red", "rejected": " Tuesday"},
]


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "pairs.jsonl", rows(7))


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory):
    """Another tiny model with the same tokenizer."""
    folder = tmp_path_factory.mktemp("other")
    make_model(5).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(train, tmp_path):
    from peft import LoraConfig

    trainer = train(peft_config=LoraConfig(target_modules="all-linear", r=4), learning_rate=1e-2, steps=3)
    trainer.save_model(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def by_raw_logits(folder, row, side, adapter=None):
    """The summed log-prob of a completion, by transformers alone: template, forward, log-softmax, no batch."""
    tokenizer = make_tokenizer()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter))
    if isinstance(row["prompt"], str):
        start, whole = tokenizer(row["prompt"]).input_ids, tokenizer(row["prompt"] + row[side] + "<|end|>").input_ids
    else:
        start = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        whole = tokenizer.apply_chat_template(row["prompt"] + row[side], return_dict=True)["input_ids"]
    with torch.no_grad():
        logps = model.eval()(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(logps[at - 1, whole[at]].item() for at in range(len(start), len(whole)))


@pytest.mark.parametrize("given", [rows(7), TEXTS], ids=["conversations", "texts"])
def test_a_whole_model_agrees_with_raw_logits(given, model_dir, other_dir, tmp_path):
    found = evaluate(str(other_dir), str(write(tmp_path / "x.jsonl", given)), reference=str(model_dir), batch_size=3)
    assert len(found) == len(given)
    for row, got in zip(given, found, strict=True):
        for side in ("chosen", "rejected"):
            policy, reference = (by_raw_logits(folder, row, side) for folder in (other_dir, model_dir))
            assert got[f"{side}_logp"] == pytest.approx(policy, abs=1e-4)
            assert got[f"ref_{side}_logp"] == pytest.approx(reference, abs=1e-4)
            assert got[f"{side}_logratio"] == pytest.approx(policy - reference, abs=1e-4)
            per_token = (policy - reference) / got[f"{side}_tokens"]
            assert got[f"{side}_logratio_per_token"] == pytest.approx(per_token, abs=1e-5)
        assert got["margin"] == got["chosen_logratio"] - got["rejected_logratio"]


def test_an_adapter_is_held_to_its_base_and_a_merged_model_says_the_same(adapter, model_dir, data, tmp_path):
    found = evaluate(str(adapter), str(data))
    row = rows(7)[3]
    policy = by_raw_logits(model_dir, row, "chosen", adapter)
    reference = by_raw_logits(model_dir, row, "chosen")
    assert abs(policy - reference) > 0.01
    assert found[3]["chosen_logp"] == pytest.approx(policy, abs=1e-4)
    assert found[3]["ref_chosen_logp"] == pytest.approx(reference, abs=1e-4)

    merged = merge(str(adapter), str(tmp_path / "merged"))
    again = evaluate(str(merged), str(data), reference=str(model_dir))
    named = evaluate(str(adapter), str(data), reference=str(model_dir))
    for one, two, three in zip(found, again, named, strict=True):
        for side in ("chosen", "rejected"):
            assert two[f"{side}_logratio"] == pytest.approx(one[f"{side}_logratio"], abs=1e-4)
            assert three[f"{side}_logratio"] == pytest.approx(one[f"{side}_logratio"], abs=1e-4)


@pytest.mark.parametrize("steps", [0, 3])
def test_an_adapter_trained_further_is_held_to_where_it_started(train, adapter, model_dir, data, tmp_path, steps):
    """What training logs for it, not the distance from the base, and of another sign here."""
    from datasets import Dataset
    from peft import PeftModel

    base = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows(8)]
    trainer = train(
        model=PeftModel.from_pretrained(base, adapter, is_trainable=True), processing_class=make_tokenizer(),
        data=Dataset.from_list(swapped), eval_dataset=Dataset.from_list(rows(7)), per_device_eval_batch_size=7,
        learning_rate=3e-3, steps=max(1, steps), run=steps > 0,
    )  # fmt: skip
    trainer.save_model(str(tmp_path / "further"))
    logged = trainer.evaluate()
    found = evaluate(str(tmp_path / "further"), str(data))
    for side in ("chosen", "rejected"):
        mean = sum(row[f"{side}_logratio"] for row in found) / 7
        assert trainer.beta * mean == pytest.approx(logged[f"eval_rewards/{side}"], abs=1e-4)
        assert (mean == 0) is (steps == 0)
    named = evaluate(str(tmp_path / "further"), str(data), reference=str(adapter))
    from_base = evaluate(str(tmp_path / "further"), str(data), reference=str(model_dir))
    margins = [sum(row["margin"] for row in given) for given in (found, named, from_base)]
    assert margins[0] == pytest.approx(margins[1], abs=1e-4)
    assert margins[0] < 0 < margins[2] or steps == 0


@pytest.mark.parametrize(
    ("setting", "named"),
    [({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"), ({"bias": "all"}, "bias='all'")],
    ids=["pissa", "bias"],
)
def test_an_adapter_that_changes_its_base_needs_a_reference(setting, named, model_dir, data, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], **setting)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        InputError, match=rf"^--reference: required, because {named} of .* changes its base\. Set the one"
    ):
        evaluate(str(tmp_path / "adapter"), str(data))
    for row in evaluate(str(tmp_path / "adapter"), str(data), reference=str(model_dir)):
        assert row["margin"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("settings", [{"target_modules": ["lm_head"]}, {"trainable_token_indices": [5]}], ids=str)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`")
def test_an_adapter_of_the_output_layer_is_evaluated_merged(settings, data, tmp_path):
    """The fused head would ignore it, or fail."""
    from peft import LoraConfig, get_peft_model

    make_model(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(**{"target_modules": ["q_proj"]} | settings)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"^--model: .* adapts the output layer, .* Merge it"):
        evaluate(str(tmp_path / "adapter"), str(data))


def test_an_adapter_of_another_base_is_the_same_error_as_for_merge(adapter, data, tmp_path):
    make_model(num_hidden_layers=1).save_pretrained(tmp_path / "short")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "short")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"^--model: .* does not fit its base model, ValueError: no layers for \d+ "):
        evaluate(str(adapter), str(data))
    with pytest.raises(InputError, match=r"^adapter: .* does not fit its base model, ValueError: no layers for \d+ "):
        merge(str(adapter), str(tmp_path / "merged"))


def test_an_adapter_with_more_tokens_than_its_base(model_dir, tmp_path):
    from peft import LoraConfig, get_peft_model

    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<a>", "<b>"])
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    assert len(tokenizer) > model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(len(tokenizer))
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = load_policy(str(tmp_path), device="cpu")
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_an_adapter_on_the_hub(adapter, data, monkeypatch):
    """Found by its configuration and downloaded, then read as any folder."""
    name = "someone/adapter"
    monkeypatch.setattr("transformers.utils.peft_utils.find_adapter_config_file", lambda given: given == name)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda given: {name: adapter}[given])
    assert evaluate(name, str(data), limit=2) == evaluate(str(adapter), str(data), limit=2)


def test_it_is_what_training_logs(train, model_dir, other_dir, data):
    """The trainer's own evaluation of one batch: means over its pairs."""
    from datasets import Dataset

    reference = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    trainer = train(
        model=str(other_dir), ref_model=reference, eval_dataset=Dataset.from_list(rows(7)), run=False,
        per_device_eval_batch_size=7,
    )  # fmt: skip
    logged = trainer.evaluate()
    found = evaluate(str(other_dir), str(data), reference=str(model_dir))
    for side in ("chosen", "rejected"):
        mean = sum(row[f"{side}_logratio"] for row in found) / 7
        assert trainer.beta * mean == pytest.approx(logged[f"eval_rewards/{side}"], abs=1e-4)
    assert summarise(found)["shares"]["displaced"][0] == pytest.approx(logged["eval_apo/displaced"])


def test_the_same_call_gives_the_same_numbers_and_batches_do_not_matter(other_dir, model_dir, data):
    once, again = (evaluate(str(other_dir), str(data), reference=str(model_dir), batch_size=4) for _ in range(2))
    assert once == again
    alone = evaluate(str(other_dir), str(data), reference=str(model_dir), batch_size=1)
    for one, two in zip(once, alone, strict=True):
        assert one["id"] == two["id"]
        assert one["chosen_logratio"] == pytest.approx(two["chosen_logratio"], abs=1e-4)


def test_the_model_itself_is_at_the_anchor(model_dir, data):
    for row in evaluate(str(model_dir), str(data), reference=str(model_dir)):
        assert (row["chosen_logratio"], row["rejected_logratio"], row["regime"]) == (0, 0, "other")


def test_rows_are_cut_as_in_training(model_dir, other_dir, tmp_path, data):
    cut = evaluate(str(other_dir), str(data), reference=str(model_dir), max_length=20)
    whole = evaluate(str(other_dir), str(data), reference=str(model_dir))
    # The first prompt, <user>Add 0 and 1.<end><assistant>, has 15 tokens of a byte each.
    assert (cut[0]["chosen_tokens"], whole[0]["chosen_tokens"]) == (5, len("It is 1") + 1)
    assert [row["chosen_logp"] for row in cut] != [row["chosen_logp"] for row in whole]
    with pytest.raises(InputError, match=r"max_length: .* fills 3 tokens\. Set a larger"):
        evaluate(str(other_dir), str(data), reference=str(model_dir), max_length=3)


def test_the_command(adapter, data, capsys):
    cli.main(["evaluate", "--model", str(adapter), "--dataset", str(data), "--limit", "5"])
    out = capsys.readouterr().out
    assert "5 evaluated pairs, computed in float32" in out
    assert f"Each pair: {adapter / 'evaluation.parquet'}" in out
    written = pq.read_table(adapter / "evaluation.parquet").to_pylist()
    assert written == evaluate(str(adapter), str(data), limit=5)
    assert written[0]["prompt"] == "Add 0 and 1."
    assert written[0]["chosen"] == "It is 1"
    assert written[0]["id"] == "row-1"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "MODEL", "--dataset", "DATA"], "--reference: required, because"),
        (["--model", "nowhere", "--reference", "MODEL", "--dataset", "DATA"], "--model: nowhere cannot be loaded"),
        (["--model", "MODEL", "--reference", "nowhere", "--dataset", "DATA"], "--reference: nowhere cannot be loaded"),
        (["--model", "MODEL", "--reference", "MODEL", "--dataset", "no.jsonl"], "--dataset: file no.jsonl not found"),
        (
            ["--model", "MODEL", "--reference", "MODEL", "--dataset", "DATA", "--split", "dev"],
            "has no pairs in 'dev'. Use one of train",
        ),
        (["--model", "MODEL", "--reference", "MODEL", "--dataset", "BAD"], "has no column 'rejected'"),
        (["--model", "MODEL", "--reference", "SMALL", "--dataset", "DATA"], "--reference: SMALL has 100 tokens"),
        (
            ["--model", "MODEL", "--reference", "MODEL", "--dataset", "DATA", "--output", "BENEATH"],
            "evaluation.parquet: cannot be written",
        ),
    ],
)
def test_what_cannot_be_used_is_one_sentence(options, words, model_dir, data, tmp_path, capsys):
    small = tmp_path / "SMALL"
    make_model(vocab_size=100).save_pretrained(small)
    make_tokenizer().save_pretrained(small)
    bad = write(tmp_path / "bad.jsonl", [{"prompt": "x", "chosen": "y"}])
    places = {
        "BENEATH": f"{data}/evaluation.parquet",
        "MODEL": str(model_dir),
        "DATA": str(data),
        "BAD": str(bad),
        "SMALL": str(small),
    }
    with pytest.raises(SystemExit) as stop:
        cli.main(["evaluate", *(places.get(option, option) for option in options)])
    assert stop.value.code == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: ")
    assert words.replace("SMALL", str(small)) in last


def test_a_summary_worked_by_hand():
    ratios = [(2.0, -1.0), (1.0, 0.5), (-1.0, -3.0), (-4.0, -5.0), (-2.0, 1.0)]
    made = [
        {"id": str(at), "chosen_logratio": c, "rejected_logratio": r, "margin": c - r, "regime": regime(c, r)}
        | {"chosen_logratio_per_token": c / 4, "rejected_logratio_per_token": r / 9}
        | {"dtype": "float32", "trained_on": at == 0}
        for at, (c, r) in enumerate(ratios)
    ]
    summary = summarise(made)
    assert [row["regime"] for row in made] == ["separated", "both_up", "displaced", "displaced", "other"]
    assert {name: share[0] for name, share in summary["shares"].items()} == pytest.approx(
        {"accuracy": 0.8, "chosen_up": 0.4, "rejected_down": 0.6, "separated": 0.2, "displaced": 0.4, "both_up": 0.2}
    )
    assert summary["means"]["chosen_logratio"][0] == pytest.approx(-0.8)
    assert [row["id"] for row in summary["displaced"]] == ["3", "2"]
    text = table(json.loads(json.dumps(summary)))
    assert "displaced                 40%" in text
    assert text.splitlines()[0] == "5 pairs (1 trained on), computed in float32"
    assert text.splitlines()[-2].split() == ["3", "chosen", "-4.00,", "rejected", "-5.00"]
    assert summary["hardly_moved"] == ""
    # |log-ratio| / sqrt(tokens): 10 / 2 and 10.5 / 3 over ten answers.
    assert movement_of(made) == pytest.approx((5 + 3.5) / 10)
    still = [row | {name: row[name] / 100 for name in row if "logratio" in name or name == "margin"} for row in made]
    record = {"settings": {"learning_rate": 5e-6, "max_steps": 30}}
    assert table(summarise(still, record)).endswith("Increase learning_rate (now 5e-06) or max_steps (now 30).")


def test_the_threshold_is_for_answers_of_any_length_and_either_direction():
    def pair(nats, tokens):
        sides = {"chosen": nats, "rejected": nats}  # displaced as a whole: a margin of 0
        return {f"{side}_logratio": value for side, value in sides.items()} | {
            f"{side}_logratio_per_token": value / tokens for side, value in sides.items()
        }

    for nats, tokens, still in ((0.04, 1, True), (0.06, 1, False), (-0.4, 100, True), (-0.6, 100, False)):
        assert bool(hardly_moved(movement_of([pair(nats, tokens)]))) is still, (nats, tokens)
    assert not hardly_moved(math.nan)


def test_a_log_is_judged_by_its_furthest_step():
    def entry(nats, prefix=""):
        values = {"rewards/chosen": 0.5 * nats, "rewards/rejected": -0.5 * nats}
        values |= {"apo/chosen_logratio_per_token": nats / 25, "apo/rejected_logratio_per_token": -nats / 25}
        return {prefix + name: value for name, value in values.items()}

    assert hardly_moved_by_log([entry(0.0), entry(0.2), {"train_loss": 1.0}], beta=0.5, steps=2)  # 0.04
    assert not hardly_moved_by_log([entry(0.3), entry(0.0)], beta=0.5)
    assert not hardly_moved_by_log([entry(0.0), entry(0.3, "eval_")], beta=0.5)
    assert not hardly_moved_by_log([entry(0.0)], beta=None)  # nor without metrics
    assert not hardly_moved_by_log([{"loss": 1.0}], beta=0.5)


@pytest.mark.parametrize(
    ("trained", "expected"),
    [("same", [True] * 7), ("others", [False] * 7), ("some", [True] * 3 + [False] * 4), ("moved", [None] * 7),
     ("changed", [None] * 7), ("not recorded", [None] * 7)],
)  # fmt: skip
def test_which_pairs_were_trained_on(trained, expected, adapter, data, tmp_path):
    """Read from the dataset in run.json, of the run or above a checkpoint; unknown is not held out."""
    others = [row | {"chosen": [{"role": "assistant", "content": "Other"}]} for row in rows(7)]
    source = tmp_path / "gone.jsonl" if trained == "moved" else data
    if used := {"others": others, "some": rows(7)[:3] + others[3:]}.get(trained):
        source = write(tmp_path / "trained.jsonl", used)
    if trained != "not recorded":
        date = "2001-01-01T00:00:00+00:00" if trained == "changed" else datetime.now(UTC).isoformat(timespec="seconds")
        record = {"dataset": str(source), "settings": {}, "versions": {}, "date": date}
        (adapter / "run.json").write_text(json.dumps(record))
    found = evaluate(str(adapter), str(data))
    assert [row["trained_on"] for row in found] == expected
    assert {row["dtype"] for row in found} == {"float32"}
    assert ("held-out" in summarise(found)["described"]) is (trained == "others")


@pytest.mark.parametrize("change", ["another folder", "a moved file", "an older checkpoint"])
def test_held_out_is_never_claimed_of_data_that_may_be_other(change, adapter, data, tmp_path, monkeypatch):
    others = write(tmp_path / "others.jsonl", [row | {"chosen": "Other"} for row in rows(7)])
    began = datetime.now(UTC) + timedelta(seconds=-60 if change == "a moved file" else 60)
    record = {"dataset": str(others), "settings": {}, "versions": {}, "date": began.isoformat(timespec="seconds")}
    model = adapter
    if change == "another folder":
        monkeypatch.chdir(tmp_path)
        record["dataset"] = "others.jsonl"
    elif change == "a moved file":
        os.utime(others, (0, 0))
        Path(others).rename(tmp_path / "moved.jsonl")
        record["dataset"] = str(tmp_path / "moved.jsonl")
    else:
        model = Path(shutil.copytree(adapter, adapter / "checkpoint-2"))
        (model / "trainer_state.json").write_text("{}")
    (adapter / "run.json").write_text(json.dumps(record))
    assert [row["trained_on"] for row in evaluate(str(model), str(data))] == [None] * 7


def test_the_two_splits_of_one_dataset(adapter, tmp_path):
    folder = tmp_path / "splits"
    folder.mkdir()
    write(folder / "train.jsonl", rows(7)[:4])
    write(folder / "test.jsonl", rows(7)[4:])
    date = datetime.now(UTC).isoformat(timespec="seconds")
    record = {"dataset": str(folder), "settings": {}, "versions": {}, "date": date}
    (adapter / "run.json").write_text(json.dumps(record))
    assert [row["trained_on"] for row in evaluate(str(adapter), str(folder))] == [False] * 3
    assert [row["trained_on"] for row in evaluate(str(adapter), str(folder), split="train")] == [True] * 4


@pytest.mark.parametrize(("rate", "still"), [("1e-8", True), ("1e-2", False)])
def test_after_training_the_end_the_evaluation_and_the_report_agree(rate, still, model_dir, data, tmp_path, capsys):
    from apo_trl.evaluation.report import report
    from apo_trl.training.arguments import parse
    from apo_trl.training.script import train

    folder = tmp_path / "run"
    options = {"model_name_or_path": model_dir, "dataset_name": data, "output_dir": folder, "learning_rate": rate}
    options |= {"max_steps": 4, "logging_steps": 1, "beta": 0.5, "report_to": "none", "save_strategy": "no"}
    options |= {"use_peft": "true", "lora_target_modules": "all-linear", "use_cpu": "true", "bf16": "false"}
    train(parse([part for name, value in options.items() for part in (f"--{name}", str(value))])[0])
    ends = [capsys.readouterr().out]
    card = (folder / "README.md").read_text()
    assert "[More Information Needed]" not in card  # PEFT's
    assert "2408.06266" in card

    cli.main(["evaluate", "--model", str(folder), "--dataset", str(data)])
    ends.append(capsys.readouterr().out)
    assert ends[1].startswith("7 pairs that were trained on, computed in float32")
    ends.append(report([str(folder)], str(tmp_path / "report.html")).read_text())
    assert "7 pairs that were trained on, in float32" in ends[2]
    assert "in float32, no autocast" in ends[2]
    assert [f"Increase learning_rate (now {float(rate):g}) or max_steps (now 4)" in end for end in ends] == [still] * 3


class TestNamesOfModels:
    @pytest.fixture
    def runs(self, adapter, tmp_path, monkeypatch):
        """The folder `runs` with one run and its checkpoint."""
        import shutil

        monkeypatch.chdir(tmp_path)
        shutil.copytree(adapter, "runs/first")
        shutil.copytree(adapter, "runs/first/checkpoint-2")
        return tmp_path

    @pytest.mark.parametrize("name", ["runs/first", "runs/first/", "runs/first/checkpoint-2", "org/name", "name"])
    def test_folders_and_hub_names_are_as_they_are(self, name, runs):
        assert find_model(name, "--model") == name

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("runs", r"--model: runs has no adapter_config.json or config.json. Set runs/first.*checkpoint-2\.$"),
            ("out", r"--model: out has no adapter_config.json or config.json. Check the name"),
            ("pairs.jsonl", r"--model: pairs.jsonl has no adapter_config.json or config.json\."),
            ("./runs/frist", r"--model: folder not found, got '\./runs/frist'. Did you mean 'runs/first'\?"),
        ],
    )
    def test_what_holds_no_model_is_one_sentence_before_anything_loads(self, name, message, runs, data):
        with pytest.raises(InputError, match=message):
            evaluate(name, str(data))
        with pytest.raises(InputError, match=message.replace("--model", "--reference")):
            evaluate("runs/first", str(data), reference=name)

    @pytest.mark.parametrize("name", ["runs/frist", "org/name"])
    def test_a_hub_name_without_a_network(self, name, runs, data):
        message = f"--reference: {name} cannot be loaded, because .* the Hub cannot be reached. .*Check the name"
        with pytest.raises(InputError, match=message) as found:
            evaluate("runs/first", str(data), reference=name)
        assert ("Did you mean 'runs/first'?" in str(found.value)) is (name == "runs/frist")

    def test_the_packaged_model_by_its_name(self, model_dir, adapter, tmp_path, monkeypatch):
        monkeypatch.setattr("apo_trl.models.packaged.smollm2", lambda: model_dir)
        tokens = len(load_tokenizer(str(model_dir)))
        assert load_config(MODEL_NAME).vocab_size == load_config(str(model_dir)).vocab_size
        assert len(load_tokenizer(MODEL_NAME)) == len(load_policy(MODEL_NAME, device="cpu")[1]) == tokens
        assert merge(str(adapter), str(tmp_path / "merged"), base=MODEL_NAME)
        data = write(tmp_path / "x.jsonl", rows(2))
        assert {row["margin"] for row in evaluate(MODEL_NAME, str(data), reference=MODEL_NAME)} == {0.0}


@pytest.mark.parametrize("chosen", [-1.0, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("rejected", [-2.0, -1.0, 0.0, 1.0])
def test_the_one_regime_is_that_of_the_metrics(chosen, rejected):
    one = torch.ones(1)
    metrics = pair_metrics(one * chosen, one * rejected, chosen_lengths=one, rejected_lengths=one)
    held = [name for name in ("separated", "displaced", "both_up") if metrics[name].item()]
    assert [regime(chosen, rejected)] == (held or ["other"])


class TestIntervals:
    @pytest.mark.parametrize(
        ("successes", "total", "low", "high"),
        # Wilson 1927 as in Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
        [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
    )
    def test_wilson(self, successes, total, low, high):
        assert wilson(successes, total) == pytest.approx((successes / total, low, high), abs=5e-5)

    def test_a_mean(self):
        # 1, 2, 3: standard deviation 1, so 1.96 / sqrt(3) either way.
        assert mean_interval([1, 2, 3]) == pytest.approx((2, 2 - 1.1316, 2 + 1.1316), abs=1e-4)
        assert mean_interval([4.0]) == (4.0, -math.inf, math.inf)

    def test_where_a_share_lies(self):
        assert probability_between(0, 0, 0, 0.5) == pytest.approx(0.5, abs=1e-4)
        # Beta(1/2, 1/2) is the arcsine law: below 1/4 lies 2/pi * asin(1/2) = 1/3.
        assert probability_between(0, 0, 0, 0.25) == pytest.approx(1 / 3, abs=1e-4)
        # Beta(3/2, 1/2): below x lies (2/pi) (asin(sqrt x) - sqrt(x (1 - x))), at 1/2 that is 1/2 - 1/pi.
        assert probability_between(1, 0, 0, 0.5) == pytest.approx(0.5 - 1 / math.pi, abs=1e-4)
        assert probability_between(900, 100, 0.85, 1) > 0.999
