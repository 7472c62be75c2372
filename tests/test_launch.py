"""Real launches: two processes on a CPU through `accelerate launch` with the hardware recipes, as a user starts them.

All train the same tiny model on the same rows in float32, half with TRL's loss and half with ours. What is compared is
one process with the same global batch: the losses of every step, and the log-probs of the model that was saved. Several
processes add up gradients in another order than one does, so the curves agree to 1e-5 and not to the last bit.
"""

import contextlib
import functools
import json
import re
import sys

import datasets
import fake_flash
import pytest
import torch
from conftest import rows
from test_cli import BIN, QUICK, command, write

from apo_trl import train, unregister
from apo_trl.io.resources import find_recipe, recipe_folder, recipe_names

pytestmark = pytest.mark.slow

HUB_ONLY = ("model_revision", "dataset_num_proc")

STEPS = 3
METHODS = {
    "full": [],
    "lora": ["--use_peft", "--lora_target_modules", "all-linear"],
    "qlora": ["--use_peft", "--lora_target_modules", "all-linear", "--load_in_4bit"],
}
CASES = [(hardware, method) for hardware in ("ddp", "zero1", "zero2", "zero3", "fsdp2") for method in ("full", "lora")]
CASES += [("zero2", "qlora"), ("zero3", "qlora")]
LOSSES = ["--loss_type", "apo_zero", "apo_zero_norm", "apo_blend", "--loss_weights", "0.5", "0.25", "0.25"]
LOSSES += ["--beta", "1.0"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, model_dir):
    """A folder with the data, and the arguments that every run has."""
    folder = tmp_path_factory.mktemp("launch")
    write(folder / "pairs.jsonl", rows(12))
    given = ["--model_name_or_path", str(model_dir), "--dataset_name", str(folder / "pairs.jsonl"), *QUICK, *LOSSES]
    given += ["--max_steps", str(STEPS), "--save_strategy", "steps", "--save_steps", str(STEPS)]
    given += ["--learning_rate", "1e-2"]
    return folder, given


@pytest.fixture(scope="module")
def alone(workplace):
    """The same run in this one process, by method, with padding, which the launched runs are without."""
    folder, given = workplace

    @functools.cache
    def run(method):
        output = folder / f"alone-{method}"
        more = ["--per_device_train_batch_size", "4", "--output_dir", str(output), "--padding_free", "false"]
        train.main([*given, *METHODS[method], *more])
        return output

    return run


def history(output):
    log = json.loads((output / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in log if "loss" in entry]


def logps(output, model_dir):
    """Log-probs of a sentence by a saved model, or by a saved adapter on the unquantised base."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if (output / "adapter_config.json").is_file():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), output)
    else:
        model = AutoModelForCausalLM.from_pretrained(output)
    ids = torch.arange(40, 72).unsqueeze(0)
    with torch.no_grad():
        return model.float()(input_ids=ids).logits.log_softmax(-1)


@pytest.mark.parametrize(("hardware", "method"), CASES, ids=["-".join(case) for case in CASES])
def test_two_processes(workplace, alone, model_dir, hardware, method):
    folder, given = workplace
    output = folder / f"{hardware}-{method}"
    launch = [BIN / "accelerate", "launch", "--config_file", recipe_folder() / "accelerate" / f"{hardware}.yaml"]
    launch += ["--num_processes", 2, "--num_machines", 1, "--mixed_precision", "no", "-m", "apo_trl.train"]
    batch = ["--per_device_train_batch_size", 2, "--output_dir", output]
    done = command(*launch, *given, *METHODS[method], *batch)
    assert done.returncode == 0, done.stderr[-3000:]

    expected, got = history(alone(method)), history(output)
    assert len(got) == len(expected) == STEPS
    assert got[0]["loss"] == pytest.approx(1.0, abs=1e-5)
    close = 1e-5 if method != "qlora" else 5e-3  # bfloat16 adapters round what the processes add up
    compared = ["loss", "loss/apo_zero", "loss/apo_zero_norm", "loss/apo_blend", "rewards/margins", "apo/chosen_up"]
    for key in [*compared, "apo/separated", "apo/chosen_logratio_per_token"]:
        assert [entry[key] for entry in got] == pytest.approx([entry[key] for entry in expected], abs=close, rel=close)
    assert min(entry["apo/tokens_saved"] for entry in got) > 1.1
    assert done.stderr.count("padding_free: attention by scaled_dot_product_attention") == 1
    assert done.stdout.count(f"Trained to step {STEPS} in ") == 1  # and not once a process

    trained, untrained = logps(alone(method), model_dir), logps(model_dir, model_dir)
    assert (trained - untrained).abs().max() > 0.05
    assert (logps(output, model_dir) - trained).abs().max() < (1e-4 if method != "qlora" else 5e-2)


@pytest.fixture(scope="module")
def reward_model(workplace):
    """The adapter of a reward model, trained for two steps."""
    folder, given = workplace
    at = given.index("--model_name_or_path")
    steps = ["--max_steps", "2", "--learning_rate", "1e-2", "--output_dir", str(folder / "reward")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", datasets.load_dataset)
        train.main(["rlhf/reward_model", *given[at : at + 4], *steps])
    return folder / "reward"


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_trains(workplace, reward_model, name, tmp_path, monkeypatch, capsys, *more):
    """Two steps of each in this process, with only model, data, steps and hardware exchanged."""
    _, given = workplace
    monkeypatch.setattr(datasets, "load_dataset", datasets.load_dataset)  # `apo-trl run` replaces it
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", sys.argv)
    at = given.index("--model_name_or_path")
    exchanged = given[at : at + 4]
    exchanged += ["--max_steps", "2", "--logging_steps", "1", "--use_cpu", "--bf16", "false"]
    exchanged += ["--output_dir", str(tmp_path / "out"), "--eval_strategy", "no", *more]
    monkeypatch.chdir(tmp_path)
    if name.startswith("rlhf/"):
        exchanged += ["--learning_rate", "1e-2"]
    if name.startswith("rlhf/rloo"):
        exchanged += ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"]
        exchanged += ["--max_completion_length", "8"]
    if name == "rlhf/rloo_verifier":
        prompts = [{"prompt": f"Name {i} fish.", "kind": "lowercase", "argument": None} for i in range(4)]
        exchanged[3] = str(write(tmp_path / "prompts.jsonl", prompts))
    if name == "rlhf/rloo":
        exchanged += ["--reward_model_name_or_path", str(reward_model)]
    if "unpaired" in name:
        labelled = [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in rows(4)
            for side in ("chosen", "rejected")
        ]
        write(tmp_path / "labelled.jsonl", labelled)
        exchanged[3] = str(tmp_path / "labelled.jsonl")
        train.main([name, *exchanged])
    else:
        # A mixture of hub datasets, and a hub revision, are data and model too.
        text = find_recipe(name).read_text().split("\ndatasets:")
        rest = text[1][text[1].index("\ndataset_num_proc") :] if len(text) > 1 else ""
        copy = tmp_path / "recipe.yaml"
        lines = [line for line in (text[0] + rest).splitlines() if not line.startswith(HUB_ONLY)]
        copy.write_text("\n".join(lines))
        flash = any(line.startswith("attn_implementation: flash") for line in lines)
        # FlashAttention needs a GPU; what stands in for it computes the same on a CPU.
        with fake_flash.installed() if flash else contextlib.nullcontext():
            before = len(fake_flash.CALLS)
            train.main([str(copy), *exchanged])
            # Two layers, two steps, policy and reference.
            assert len(fake_flash.CALLS) - before >= 8 if flash else len(fake_flash.CALLS) == before
    unregister()
    (end,) = re.findall("Trained to step 2 .*", capsys.readouterr().out)
    assert ("tokens saved" in end) == ("unpaired" not in name and not name.startswith("rlhf/"))
    assert list((tmp_path / "out").glob("*.safetensors"))


def test_rloo_scores_with_the_reward_model_as_it_was_trained(workplace, reward_model, model_dir):
    """TRL loads the folder of an adapter with `from_pretrained`; base, adapter and `score` must all be in place."""
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForSequenceClassification

    inputs = {"input_ids": torch.arange(40, 72).unsqueeze(0)}
    base = AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=1)
    assert PeftConfig.from_pretrained(reward_model).task_type == "SEQ_CLS"
    expected = PeftModel.from_pretrained(base, reward_model).eval()
    loaded = AutoModelForSequenceClassification.from_pretrained(reward_model, num_labels=1)
    with torch.no_grad(), expected.disable_adapter():
        untrained = expected(**inputs).logits
    with torch.no_grad():
        trained, scores = expected(**inputs).logits, loaded(**inputs).logits
    assert (trained - untrained).abs().max() > 1e-2
    assert torch.equal(scores, trained)


@pytest.mark.parametrize("name", ["rlhf/reward_model", "rlhf/rloo", "rlhf/rloo_verifier"])
def test_the_full_form_of_the_rlhf_recipes(workplace, reward_model, name, tmp_path, monkeypatch, capsys):
    test_every_recipe_trains(workplace, reward_model, name, tmp_path, monkeypatch, capsys, "--use_peft", "false")
    assert (tmp_path / "out" / "model.safetensors").is_file()
