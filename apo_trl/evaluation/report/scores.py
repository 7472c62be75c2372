"""The page of scored answers: what `apo-trl score` wrote to one or several folders, side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from apo_trl.checks.rewards import FOLLOWED
from apo_trl.errors import InputError
from apo_trl.evaluation.intervals import mean_interval
from apo_trl.io.files import read_json
from apo_trl.io.html import render

__all__ = ["Scores", "comparison", "is_scored", "read_scores", "scores_page"]


class Scores(NamedTuple):
    """The content of a folder's score.json and answers.parquet, the answers by id."""

    name: str
    report: Mapping[str, Any]
    answers: Mapping[str, Mapping[str, Any]]


def is_scored(folder: Path) -> bool:
    """Return whether a folder holds scores, and is not the folder of a training run too."""
    trained = [folder / "trainer_state.json", *folder.glob("checkpoint-*/trainer_state.json")]
    return (folder / "score.json").is_file() and not any(path.is_file() for path in trained)


def read_scores(folder: Path, name: str) -> Scores:
    """Read the files that `apo-trl score` wrote. Raises InputError if one is missing or damaged."""
    report = read_json(folder / "score.json")
    try:
        with pq.ParquetFile(folder / "answers.parquet") as file:
            rows = file.read(columns=["id", "prompt", "answer", "score"]).to_pylist()
        if not isinstance(report, dict) or "followed" not in report:
            raise ValueError("score.json is damaged")
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{folder}: scores cannot be read ({str(error)[:150]}). Run `apo-trl score` again.") from error
    # A repeated prompt may have the id of the first one, but no score.
    return Scores(name, report, {row["id"]: row for row in reversed(rows)})


def scores_page(runs: Sequence[Scores]) -> str:
    """Return the HTML page of some folders' scores, without scripts or links to other files."""
    kinds = dict.fromkeys(kind for run in runs for kind in run.report["by_kind"])
    shares = {"Followed": [run.report["followed"] for run in runs]}
    shares |= {kind: [run.report["by_kind"].get(kind, {}).get("followed") for run in runs] for kind in kinds}
    return render(
        Path(__file__).with_name("scores.html.jinja"),
        runs=runs,
        shares=shares,
        conclusions=[_conclusion(run) for run in runs],
        comparison=[comparison(runs[0], run) for run in runs[1:]],
    )


def _conclusion(run: Scores) -> str:
    report = run.report
    if not report["followed"]:
        return f"None of the {report['prompts']:,} prompts has a score."
    value, low, high = report["followed"]
    text = f"{report['model']} followed {value:.0%} of {report['scored']:,} scored prompts ({low:.0%} to {high:.0%})"
    return f"{text}; {report['broken']:.0%} of the answers are broken; {report['words']:.0f} words on average."


def comparison(first: Scores, second: Scores) -> str:
    """Return how much more often the second follows than the first, with a paired 95 % interval."""
    if first.answers.keys() != second.answers.keys() or first.report["function"] != second.report["function"]:
        return f"{second.name} and {first.name} have different prompts or functions, so they cannot be compared."
    pairs = [(first.answers[name]["score"], answer["score"]) for name, answer in second.answers.items()]
    changes = [(new > FOLLOWED) - (old > FOLLOWED) for old, new in pairs if None not in (old, new)]
    if not changes:
        return f"No prompt has a score of both {second.name} and {first.name}."
    value, low, high = (100 * each for each in mean_interval(changes))
    counts = f"{changes.count(1):,} prompts gained and {changes.count(-1):,} lost, of {len(changes):,}"
    points = f"{value:+.0f} points ({low:+.0f} to {high:+.0f})"
    if low <= 0 <= high:
        return f"No difference is shown between {second.name} and {first.name}: {points}; {counts}."
    return f"{second.name} follows {'more' if value > 0 else 'less'} than {first.name}: {points}; {counts}."
