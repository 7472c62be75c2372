"""Real launches: two processes on a CPU through `accelerate launch` with the hardware recipes, as a user starts them.

All train the same tiny model on the same rows in float32, half with TRL's loss and half with ours. What is compared is
one process with the same global batch: the losses of every step, and the log-probs of the model that was saved. Several
processes add up gradients in another order than one does, so the curves agree to 1e-5 and not to the last bit.
"""

import functools
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import rows
from test_cli import BIN, DPO_SCRIPT, QUICK, command, write

from apo_trl import train
from apo_trl.io.resources import find_recipe, recipe_folder, recipe_names

pytestmark = pytest.mark.slow

CPU = recipe_folder() / "accelerate" / "cpu.yaml"
KTO_SCRIPT = DPO_SCRIPT.parent / "kto.py"
HUB_ONLY = ("model_revision", "dataset_num_proc")

# FlashAttention needs a GPU; what stands in for it computes the same on a CPU.
WITH_FLASH = """
import sys

sys.path.insert(0, {tests!r})
import fake_flash

fake_flash.install()
from apo_trl.train import main

main(sys.argv[1:])
print(len(fake_flash.CALLS), "calls of a variable-length function")
assert len(fake_flash.CALLS) >= 8  # two layers, two steps, policy and reference
"""

STEPS = 3
METHODS = {
    "full": [],
    "lora": ["--use_peft", "--lora_target_modules", "all-linear"],
    "qlora": ["--use_peft", "--lora_target_modules", "all-linear", "--load_in_4bit"],
}
CASES = [(hardware, method) for hardware in ("ddp", "zero1", "zero2", "zero3", "fsdp2") for method in ("full", "lora")]
CASES += [("zero2", "qlora"), ("zero3", "qlora")]
LOSSES = ["--loss_type", "apo_zero", "apo_zero_norm", "--loss_weights", "0.5", "0.5", "--beta", "1.0"]


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
    for key in ("loss", "loss/apo_zero", "loss/apo_zero_norm", "rewards/margins", "apo/chosen_logratio_per_token"):
        assert [entry[key] for entry in got] == pytest.approx([entry[key] for entry in expected], abs=close, rel=close)
    assert min(entry["apo/tokens_saved"] for entry in got) > 1.1
    assert done.stderr.count("padding_free: attention by scaled_dot_product_attention") == 1
    assert done.stdout.count(f"Trained to step {STEPS} in ") == 1  # and not once a process

    trained, untrained = logps(alone(method), model_dir), logps(model_dir, model_dir)
    assert (trained - untrained).abs().max() > 0.05
    assert (logps(output, model_dir) - trained).abs().max() < (1e-4 if method != "qlora" else 5e-2)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_trains(workplace, model_dir, name, tmp_path, monkeypatch):
    """Two steps of each, with only model, data, steps and hardware exchanged."""
    _, given = workplace
    at = given.index("--model_name_or_path")
    exchanged = given[at : at + 4]
    exchanged += ["--max_steps", "2", "--logging_steps", "1", "--use_cpu", "--bf16", "false"]
    exchanged += ["--output_dir", str(tmp_path / "out"), "--eval_strategy", "no"]
    monkeypatch.chdir(tmp_path)
    if "unpaired" in name:
        labelled = [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in rows(4)
            for side in ("chosen", "rejected")
        ]
        write(tmp_path / "labelled.jsonl", labelled)
        exchanged[3] = str(tmp_path / "labelled.jsonl")
        script = [BIN / "apo-trl", "run", KTO_SCRIPT]
        done = command(*script, "--config", find_recipe(name), *exchanged)
    else:
        # A mixture of hub datasets, and a hub revision, are data and model too.
        text = find_recipe(name).read_text().split("\ndatasets:")
        rest = text[1][text[1].index("\ndataset_num_proc") :] if len(text) > 1 else ""
        copy = tmp_path / "recipe.yaml"
        lines = [line for line in (text[0] + rest).splitlines() if not line.startswith(HUB_ONLY)]
        copy.write_text("\n".join(lines))
        script = ["-m", "apo_trl.train"]
        if flash := any(line.startswith("attn_implementation: flash") for line in lines):
            script = [tmp_path / "with_flash.py"]
            script[0].write_text(WITH_FLASH.format(tests=str(Path(__file__).parent)))
        done = command(BIN / "accelerate", "launch", "--config_file", CPU, *script, copy, *exchanged)
        assert ("calls of a variable-length function" in done.stdout) == flash
    assert done.returncode == 0, done.stderr[-3000:]
    (end,) = re.findall("Trained to step 2 .*", done.stdout)
    assert ("tokens saved" in end) == ("unpaired" not in name)
    assert list((tmp_path / "out").glob("*.safetensors"))
