"""docs/evidence.md: its data is what it says, its tables are those of the stored results, and a run does run."""

import functools
import json
import shlex
import shutil
import sys

import pytest
from test_docs import DOCS, commands

sys.path.insert(0, str(DOCS))

import evidence
import evidence_data as data
import evidence_figures as figures
from sample_demo_pairs import demo_rows

from apo_trl.io.rows import degenerate_reason, normalise_row

ROWS = demo_rows()


def texts(row):
    return [row[side][0]["content"] for side in ("prompt", "chosen", "rejected")]


class TestData:
    def test_nothing_that_is_held_out_is_trained_on(self):
        splits = [data.split(ROWS, seed) for seed in figures.SEEDS]
        for train, held_out in splits:
            assert len(held_out) == 40
            assert len(train) == 72
            assert not {row["id"] for row in train} & {row["id"] for row in held_out}
        assert splits[0] != splits[1]

    def test_every_set_is_of_usable_pairs(self):
        samples = {row["id"]: f"Another answer to {row['id']}." for row in ROWS}
        sets = [data.clair(ROWS), data.unrelated(ROWS, samples), data.lengths(ROWS, 0), data.mixture(ROWS, 0)]
        for rows in sets:
            for row in rows:
                assert normalise_row(row)
                assert degenerate_reason(row) is None
        assert texts(sets[1][0])[1] == texts(sets[0][0])[1]
        assert texts(sets[1][0])[2] == f"Another answer to {ROWS[0]['id']}."

    def test_long_pairs_are_five_short_ones(self):
        rows = data.lengths(ROWS[:40], 0)
        assert sorted(row["kind"] for row in rows) == ["long"] * 4 + ["short"] * 20
        used = [part for row in rows for part in row["id"].split("+")]
        assert sorted(used) == sorted(row["id"] for row in ROWS[:40])
        long = next(row for row in rows if row["kind"] == "long")
        whole = {row["id"]: texts(row) for row in ROWS}
        for number, part in enumerate(long["id"].split("+"), start=1):
            for joined, text in zip(texts(long), whole[part], strict=True):
                assert f"{number}. {text}" in joined

    def test_the_mixture_has_winners_better_and_worse_than_the_model(self):
        rows = data.mixture(ROWS, 0)
        assert [row["chosen_wins"] for row in rows] == [1.0, 0.0] * 56
        for row, original in zip(rows, ROWS, strict=True):
            _, chosen, rejected = texts(original)
            if row["kind"] == "better":
                assert texts(row)[1:] == [chosen, rejected]
            else:
                assert set(texts(row)[1].split()) <= set(rejected.split())
                assert sorted(texts(row)[2].split()) == sorted(rejected.split())
                assert texts(row)[1] != rejected


def test_shares_worked_by_hand():
    pairs = [(2.0, -1.0, [2, 4]), (-1.0, -2.0, [1, 1]), (-3.0, 1.0, [3, 2]), (1.0, 3.0, [1, 3])]
    result = {"held_out": [{"id": "x", "kind": "k", "c": c, "r": r, "n": n} for c, r, n in pairs]}
    assert figures.shares(result) == pytest.approx(
        {"chosen": -0.25, "rejected": 0.25, "chosen_up": 0.5, "rejected_down": 0.5, "displaced": 0.25, "accuracy": 0.5,
         "chosen_per_token": 0.0, "rejected_per_token": (-0.25 - 2 + 0.5 + 1) / 4}
    )  # fmt: skip


class TestPage:
    def test_every_run_is_stored_once(self):
        results = evidence.load()
        runs = [result["run"] for result in results]
        wanted = figures.swept()
        wanted += [run for run in figures.planned(figures.chosen_rate(results)) if run not in wanted]
        assert len(wanted) == 48
        assert all(runs.count(run) == 1 for run in wanted)

    def test_its_tables_are_those_of_the_stored_results(self):
        page = figures.PAGE.read_text(encoding="utf-8")
        tables = figures.tables(evidence.load())
        assert set(tables) == {"sweep", "losses", "pairs", "lengths", "mixture"}
        for name, table in tables.items():
            assert f"<!-- {name} -->\n{table}\n<!-- end -->" in page, name

    def test_its_pictures_can_be_drawn(self, tmp_path, monkeypatch):
        results = evidence.load()
        monkeypatch.setattr(figures, "STORE", tmp_path)
        figures.draw(results)
        names = {path.name for path in tmp_path.glob("*.png")}
        page = figures.PAGE.read_text(encoding="utf-8")
        assert names == {"losses.png", "unrelated.png", "comparisons.png"}
        assert all(f"(evidence/{name})" in page and (DOCS / "evidence" / name).is_file() for name in names)


@pytest.mark.parametrize(
    ("kind", "loss"), [("clair", "sigmoid"), ("lengths", "apo_zero_norm"), ("mixture", "apo_blend")]
)
def test_a_run_moves_held_out_pairs_and_starts_at_the_anchor(model_dir, kind, loss, capfd):
    lab = evidence.Lab(model=str(model_dir), steps=2)
    result = lab.train({"data": kind, "loss": loss, "seed": 0, "rate": 1e-2, "beta": 0.1})
    assert result["margins"][0] == pytest.approx(0, abs=1e-3)
    assert len(result["margins"]) == 2
    assert len(result["held_out"]) == {"clair": 40, "lengths": 24, "mixture": 40}[kind]
    assert any(abs(pair["c"]) > 1e-3 for pair in result["held_out"])
    assert (result["beta"] > 1) == (loss == "apo_zero_norm")


@pytest.mark.slow
def test_all_of_it_anew_and_again(model_dir, tmp_path, monkeypatch, capsys):
    """As the page shows it, with the tiny model, one step, one seed and two rates; then nothing is left to do."""
    shutil.copy(figures.PAGE, tmp_path / "evidence.md")
    (tmp_path / "results.json").write_text("stale")
    shutil.copy(DOCS / "evidence" / "samples.json", tmp_path)
    for module in (evidence, figures):
        monkeypatch.setattr(module, "STORE", tmp_path)
    monkeypatch.setattr(figures, "PAGE", tmp_path / "evidence.md")
    monkeypatch.setattr(figures, "SEEDS", (0,))
    monkeypatch.setattr(figures, "RATES", (1e-3, 1e-2))
    monkeypatch.setattr(evidence, "Lab", functools.partial(evidence.Lab, model=str(model_dir), steps=1))
    (line,) = (found.text for found in commands(DOCS / "evidence.md") if "--fresh" in found.text)
    program, script, *options = shlex.split(line, comments=True)
    assert (program, script) == ("python", "docs/evidence.py")
    monkeypatch.setattr(sys, "argv", [script, *options])
    evidence.main()
    told = [line for line in capsys.readouterr().out.splitlines() if " runs left, about " in line]
    assert [int(line.split(" runs left")[0].split()[-1]) for line in told] == list(range(16, -1, -1))
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert len(results) == 17
    page = (tmp_path / "evidence.md").read_text()
    assert figures.tables(results)["losses"] in page
    assert page != (DOCS / "evidence.md").read_text()
    assert len(list(tmp_path.glob("*.png"))) == 3
    monkeypatch.setattr(sys, "argv", [script])
    monkeypatch.setattr(evidence.Lab.func, "train", None)
    evidence.main()
    assert (tmp_path / "evidence.md").read_text() == page
