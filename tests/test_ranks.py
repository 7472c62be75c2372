"""What the processes of one launch share: work over rows that one does for all, and forwards that all do alike."""

import functools
import json
import logging

import pytest
from conftest import curve, rows
from datasets import Dataset, load_dataset
from test_cli import BIN, command, write

from apo_trl import APOConfig, InputError
from apo_trl.datasets import preprocessing as dataset
from apo_trl.io.resources import recipe_folder

HEAD = """
import faulthandler, functools, json, sys
from datasets import load_dataset
from apo_trl import APOConfig, APOTrainer, InputError

faulthandler.dump_traceback_later(200, exit=True)  # processes that wait for each other end, and say where
model, data, output = sys.argv[1:]
args = APOConfig(
    output, max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1, report_to="none",
    save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
)

def load(name):
    return load_dataset("json", data_files=f"{data}/{name}.jsonl", split="train", cache_dir=f"{data}/cache")

def report(**values):
    with open(f"{output}-{args.process_index}.json", "w") as file:
        json.dump(values, file)
"""

ROWS = """
from apo_trl.datasets import preprocessing as dataset

seen, inner = 0, dataset._by_row

@functools.wraps(inner)  # and so the same to the cache
def counted(batch, **settings):
    global seen
    seen += len(batch["chosen"])
    return inner(batch, **settings)

dataset._by_row = counted
try:
    APOTrainer(model, args=args, train_dataset=load("bad"))
except InputError as error:
    refusal = str(error)
checked = seen
trainer = APOTrainer(model, args=args, train_dataset=load("good"))
report(refusal=refusal, checked=checked, both=seen - checked, columns=trainer.train_dataset.column_names)
"""

FORWARDS = """
from apo_trl.prefix_sharing.support import TESTED

TESTED.clear()
trainer = APOTrainer(model, args=args, train_dataset=load("good"))
packing, forwards, unpackable = trainer.data_collator, 0, []
collate = packing.collator

def without_predecessor(examples):
    batch = collate(examples)
    if args.process_index == 0 and not unpackable:
        unpackable.append(True)
        batch["attention_mask"][0, : batch["completion_mask"][0].argmax()] = 0
    return batch

def count(*_):
    global forwards
    forwards += 1

packing.collator = without_predecessor
trainer.model.base_model.register_forward_pre_hook(count)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
saved = [entry["apo/tokens_saved"] for entry in trainer.state.log_history if "loss" in entry]
report(reason=trainer._sharing.reason, forwards=forwards, losses=losses, saved=saved, unpackable=unpackable)
"""


@pytest.fixture
def launch(tmp_path, model_dir):
    """Run a script in two processes and return what each reported."""

    def run(hardware, script):
        (tmp_path / "script.py").write_text(HEAD + script)
        launcher = ["launch", "--config_file", recipe_folder() / "accelerate" / f"{hardware}.yaml"]
        launcher += ["--num_processes", 2, "--num_machines", 1, "--mixed_precision", "no"]
        given = [tmp_path / "script.py", model_dir, tmp_path, tmp_path / "out"]
        done = command(BIN / "accelerate", *launcher, *given)
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads((tmp_path / f"out-{rank}.json").read_text()) for rank in range(2)]

    write(tmp_path / "good.jsonl", rows(12))
    write(tmp_path / "bad.jsonl", [*rows(5), rows(1)[0] | {"rejected": None}, *rows(2)])
    return run


@pytest.mark.slow
def test_one_process_looks_at_the_rows_and_only_once(launch, train, counted, tmp_path):
    first, second = launch("ddp", ROWS)
    assert first["refusal"] == second["refusal"]
    assert first["refusal"].startswith("Row 5 of the train dataset has no 'rejected'")
    assert (first["checked"], first["both"]) == (8, 2 * 12)
    assert second["checked"] == second["both"] == 0
    assert "reason" not in first["columns"]
    # Nor does another process look at them, later.
    source = {"path": "json", "split": "train", "cache_dir": str(tmp_path / "cache")}
    bad, good = (load_dataset(data_files=f"{tmp_path}/{name}.jsonl", **source) for name in ("bad", "good"))
    with pytest.raises(InputError, match="Row 5 of the train dataset"):
        train(run=False, data=bad)
    train(run=False, data=good)
    assert counted == []


@pytest.mark.slow
@pytest.mark.parametrize("hardware", ["ddp", "zero3", "fsdp2"])
def test_every_process_does_the_same_forwards(launch, hardware):
    """An unknown architecture, and a first batch of which rank 0 cannot build a layout."""
    first, second = launch(hardware, FORWARDS)
    assert first["unpackable"] == [True]
    assert second["unpackable"] == []
    assert first["reason"] == second["reason"] == ""
    assert first["forwards"] == second["forwards"] == 3 + 2  # two of them to compare
    assert len(first["losses"]) == 3
    assert all(abs(loss) < 10 for loss in first["losses"])
    assert first["saved"][-1] > 1.1


@pytest.fixture
def counted(monkeypatch):
    """How many rows each look at a dataset was for."""
    counts, inner = [], dataset._by_row

    @functools.wraps(inner)
    def count(batch, **settings):
        counts.append(len(batch["chosen"]))
        return inner(batch, **settings)

    monkeypatch.setattr(dataset, "_by_row", count)
    return counts


def test_rows_are_looked_at_again_only_if_something_changed(train, tmp_path, counted, monkeypatch):
    write(tmp_path / "good.jsonl", rows(12))

    def looked_at(**settings):
        counted.clear()
        source = {"data_files": str(tmp_path / "good.jsonl"), "cache_dir": str(tmp_path / "cache"), "split": "train"}
        train(run=False, data=load_dataset("json", **source), **settings)
        return list(counted)

    assert looked_at() == [12, 12]
    assert looked_at(output_dir=str(tmp_path / "other"), learning_rate=1e-4) == []
    assert looked_at(max_length=500) == [12]
    assert looked_at(loss_type="apo_blend") == [12, 12]  # it reads a column more
    monkeypatch.setattr("apo_trl.datasets.preprocessing._RULES", "those of a later version")
    assert looked_at() == [12, 12]


def test_several_workers_number_the_rows_as_one_does():
    data = rows(2500)
    for number in (1700, 2400):
        data[number] |= {"rejected": None}
    args = APOConfig("out", use_cpu=True, bf16=False, dataset_num_proc=2)
    with pytest.raises(InputError, match=r"^Row 1700 of the train dataset has no 'rejected'"):
        dataset.normalise_datasets(Dataset.from_list(data), "train", False, args)


def test_one_process_that_cannot_pack_stops_all(train, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr("apo_trl.prefix_sharing.model.TESTED", set())
    trainer = train(run=False, padding_free=True)
    decisions = []
    trainer._sharing.all_agree = lambda agreed: decisions.append(agreed)  # None: not all
    trainer.train()
    assert decisions == [True]
    assert trainer._sharing.reason == "another process cannot compute a packed batch"
    assert len([record for record in caplog.records if "padding_free" in record.message]) == 1
    assert curve(trainer) == curve(train(padding_free=False))
