"""The values of `page.html.jinja`: one HTML file without scripts or links to other files, for screen and paper."""

import json
import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apo_trl.evaluation.provenance import described, trained_in
from apo_trl.evaluation.report.conclusions import SHARES, comparison, conclusion, share, unmoved
from apo_trl.evaluation.report.figures import Panel
from apo_trl.evaluation.report.runs import Run, evaluation_sets
from apo_trl.io.html import render

__all__ = ["page"]

_LOGGED = (
    ("Reward of chosen", "rewards/chosen", "+.3f"),
    ("Reward of rejected", "rewards/rejected", "+.3f"),
    ("Accuracy", "rewards/accuracies", ".1%"),
)

Cell = tuple[str, ...]  # a text, and remarks in small print
Rows = dict[str, list[Cell]]  # the cells of each row of a table by its label, one for each run


def page(runs: Sequence[Run], figures: Mapping[str, Sequence[Panel]]) -> str:
    """Return the page of some runs, with the pictures of each kind in it."""
    evaluated = [frozenset((row["prompt"], row["chosen"], row["rejected"]) for row in run.pairs or ()) for run in runs]
    records = [run.record for run in runs if run.record is not None]
    inputs = [{key: record.get(key) for key in ("model", "dataset", "date", "device")} for record in records]
    settings = _rows([record["settings"] for record in records], "default")
    repeated = ("model_name_or_path", "dataset_name")  # the same as the model and the dataset
    betas = {_setting(run, "beta")[0] for run in runs}
    moved = [run for run in runs if not unmoved(run)]
    comparable = len(moved) > 1 and all(evaluated) and len(set(evaluated)) == 1
    return render(
        Path(__file__).with_name("page.html.jinja"),
        runs=runs,
        figures=figures,
        base64=lambda picture: b64encode(picture).decode(),
        displaced=_displaced,
        shorten=_shorten,
        conclusions=[conclusion(run) for run in runs],
        comparison=comparison(moved) if comparable else [],
        betas=sorted(betas) if len(betas) > 1 else [],
        results=_results(runs),
        different_pairs=len({pairs for pairs in evaluated if pairs}) > 1,
        settings=_rows(inputs, "not known") | {key: row for key, row in settings.items() if key not in repeated},
        versions=_rows([record["versions"] for record in records], "not installed"),
    )


def _displaced(pairs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    displaced = [pair for pair in pairs if pair["regime"] == "displaced"]
    return sorted(displaced, key=lambda pair: (math.isnan(pair["chosen_logratio"]), pair["chosen_logratio"]))


def _shorten(name: str, longest: int = 120) -> str:
    """Leave out the middle of a long name: names of runs often differ at their ends."""
    return name if len(name) <= longest else f"{name[: longest // 2]}…{name[-longest // 2 :]}"


def _results(runs: Sequence[Run]) -> Rows:
    rows = {
        "Loss": [_setting(run, "loss_type") for run in runs],
        "beta": [_setting(run, "beta") for run in runs],
        "Learning rate": [_learning_rate(run) for run in runs],
        "Steps": [_steps(run) for run in runs],
        "Last training loss": [_last(run, "loss", ".4f") for run in runs],
    }
    if any(run.pairs is not None for run in runs):
        labels = {"separated": "Separated pairs", "displaced": "Displaced pairs", "accuracy": "Accuracy"}
        rows |= {labels[name]: [_share(run, name) for run in runs] for name in SHARES}
        rows["Evaluated"] = [_evaluated(run) for run in runs]
    sets = dict(pair for run in runs for pair in evaluation_sets(run.log).items())
    if len(sets) > 1 or any(run.pairs is None for run in runs):  # one accuracy of a model is enough
        for prefix, name in sets.items():
            of_set = name.removeprefix("evaluation")
            for label, key, form in _LOGGED:
                rows[f"{label} in training{of_set}"] = [_logged(run, prefix, key, form) for run in runs]
    if any(run.record is not None for run in runs):
        rows["Trained"] = [(trained_in(run.record),) for run in runs]
    return rows


def _setting(run: Run, key: str) -> Cell:
    return ("not known",) if run.record is None else _cell(run.record["settings"].get(key), "default")


def _learning_rate(run: Run) -> Cell:
    logged = [value for value in run.log.get("learning_rate", {}).values() if math.isfinite(value)]
    return (f"{max(logged):.3g} (largest logged)",) if run.record is None and logged else _setting(run, "learning_rate")


def _steps(run: Run) -> Cell:
    done = run.state.get("global_step") or max((step for points in run.log.values() for step in points), default=0)
    planned = run.state.get("max_steps") or 0
    return (f"{done:,} of {planned:,}" if planned > done else f"{done:,}",)


def _last(run: Run, key: str, form: str) -> Cell:
    points = run.log.get(key)
    if not points:
        return ("not logged",)
    last, end = max(points), max(step for each in run.log.values() for step in each)
    return (format(points[last], form), *([f"at step {last:,}"] if last < end else []))


def _logged(run: Run, prefix: str, key: str, form: str) -> Cell:
    text, *remarks = _last(run, prefix + key, form)
    over = "pairs" if f"{prefix}apo/separated" in run.log else "batches"  # as plain TRL logs them
    return (text, *remarks, *([f"mean over {over}"] if prefix + key in run.log else []))


def _share(run: Run, name: str) -> Cell:
    if run.pairs is None:
        return ("not evaluated",)
    value, low, high = share(run, name)
    count = round(value * len(run.pairs))
    return f"{value:.1%}", f"({low:.1%} to {high:.1%})", f"{count:,} of {len(run.pairs):,}"


def _evaluated(run: Run) -> Cell:
    if run.pairs is None:
        return ("not evaluated",)
    return (f"{described([pair['trained_on'] for pair in run.pairs])}, in {run.pairs[0]['dtype']}",)


def _rows(columns: Sequence[Mapping[str, Any]], absent: str) -> Rows:
    keys = sorted({key for column in columns for key, value in column.items() if value not in (None, "", [], {})})
    return {key: [_cell(column.get(key), absent) for column in columns] for key in keys}


def _cell(value: object, absent: str) -> Cell:
    if value is None:
        return (absent,)
    if isinstance(value, list) and value:
        value = ", ".join(map(str, value))
    return (value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False),)
