"""Preference pairs made by people and by models elsewhere; found by APO_TRL_DATA, skipped by name without it."""

import os
from pathlib import Path

import pytest
from conftest import curve

from apo_trl.io.readers import load_dataset

DATA = Path(os.environ.get("APO_TRL_DATA", "/nowhere"))
FILES = {
    "clair_gpt4_revisions": 20,
    "gsm8k_model_solutions": 1894,
    "humanevalfix_6lang": 984,
    "quixbugs_python": 40,
    "truthfulqa_best_vs_incorrect": 3298,
}

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="APO_TRL_DATA names no folder of real preference pairs")


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_trains_on(name, train, caplog):
    data = load_dataset(str(DATA / f"{name}.jsonl.gz"), split="train")
    assert len(data) == FILES[name]
    trainer = train(data=data, loss_type=["apo_zero_norm", "apo_zero"], max_length=512, steps=2, dataset_num_proc=None)
    losses = curve(trainer)
    assert losses[0] == pytest.approx(2.0, abs=1e-6)
    assert abs(losses[1] - 2.0) > 1e-6  # it moved; a random model may move either way on other rows
    assert all(norm > 0 for norm in curve(trainer, "grad_norm"))
    # Nothing is lost silently: what is not trained on was counted.
    left_out = len(data) - len(trainer.train_dataset)
    assert (f"{left_out} of {len(data)} pairs" in caplog.text) == (left_out > 0)
