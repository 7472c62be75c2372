"""`apo-trl bench`: that it measures what it says, small; its figures are in docs/performance.md."""

import json
import re

import pytest
from conftest import rows
from test_cli import write

from apo_trl.benchmark.cases import CASES
from apo_trl.cli import main as cli


@pytest.mark.filterwarnings("ignore:.*None of the inputs have requires_grad.*:UserWarning")
def test_it_compares_while_it_times(model_dir, tmp_path, capsys):
    write(tmp_path / "mine.jsonl", rows(8))
    cli.main(
        ["bench", str(tmp_path / "mine.jsonl"), "--model", str(model_dir), "--repeats", "1", "--device", "cpu",
         "--json", str(tmp_path / "figures.json")]
    )  # fmt: skip
    figures = {row["name"]: row for row in json.loads((tmp_path / "figures.json").read_text())}
    assert list(figures) == [*CASES, "the demo's pairs", "mine.jsonl"]
    for row in figures.values():
        assert row["tokens_saved"] > 1
        assert row["step_time"] > 0
        assert row["logps_differ"] < 1e-4
        assert row["gradients_differ"] < 1e-4
        assert 0 < row["peak_memory"] < 2
        assert re.fullmatch(r"\w.*; TRL: sdpa", row["kernel"])
    # Three ranked answers: by hand, six rows of about 320 tokens against one prompt and three answers, about 620.
    assert figures["3 pairs of 3 ranked answers, 170 / 150"]["tokens_saved"] > 2.5
    out = capsys.readouterr().out
    assert out.count("\n|") == 2 + len(figures)


def test_a_model_that_cannot_be_loaded(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "--model", str(tmp_path)])
    assert stop.value.code == 2
    assert f"{tmp_path} cannot be loaded" in capsys.readouterr().err
