"""The values of `page.html.jinja`: one HTML file without scripts or links to other files, for screen and paper."""

import json
import math
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from apo_trl.evaluation.intervals import wilson
from apo_trl.evaluation.report.figures import Panel
from apo_trl.evaluation.report.runs import Run, held_out

__all__ = ["page"]

# Of APOConfig, for runs of `apo-trl train` on pairs: run.json holds only what differs. A test compares them.
_DEFAULTS = {"loss_type": "apo_zero", "beta": "0.1", "learning_rate": "1e-06"}

Cell = tuple[str, ...]  # a text, and remarks in small print
Rows = dict[str, list[Cell]]  # the cells of each row of a table by its label, one for each run


def page(runs: Sequence[Run], figures: Mapping[str, Sequence[Panel]]) -> str:
    """Return the page of some runs, with the pictures of each kind in it."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"base64": b64encode, "displaced": _displaced, "shorten": _shorten}
    evaluated = [frozenset((row["prompt"], row["chosen"], row["rejected"]) for row in run.pairs or ()) for run in runs]
    records = [run.record for run in runs if run.record is not None]
    inputs = [{key: record.get(key) for key in ("model", "dataset")} for record in records]
    settings = _rows([record["settings"] for record in records], "default")
    repeated = ("model_name_or_path", "dataset_name")  # the same as the model and the dataset
    html = environment.get_template("page.html.jinja").render(
        runs=runs,
        figures=figures,
        version=version("apo-trl"),
        results=_results(runs),
        different_pairs=len({pairs for pairs in evaluated if pairs}) > 1,
        settings=_rows(inputs, "not known") | {key: row for key, row in settings.items() if key not in repeated},
        versions=_rows([record["versions"] for record in records], "not installed"),
    )
    # HTML allows neither most control characters nor half of a surrogate pair.
    return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]", "\ufffd", html)


def _displaced(pairs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    displaced = [pair for pair in pairs if pair["regime"] == "displaced"]
    return sorted(displaced, key=lambda pair: (math.isnan(pair["chosen_logratio"]), pair["chosen_logratio"]))


def _shorten(name: str, longest: int = 120) -> str:
    """Leave out the middle of a long name: names of runs often differ at their ends."""
    return name if len(name) <= longest else f"{name[: longest // 2]}…{name[-longest // 2 :]}"


def _results(runs: Sequence[Run]) -> Rows:
    metrics = {"Last training loss": ("loss", ".4f")}
    for prefix, name in (dict(pair for run in runs for pair in held_out(run.log).items()) or {"eval_": ""}).items():
        of_set = name.removeprefix("held out")
        metrics[f"Held-out reward of chosen{of_set}"] = (f"{prefix}rewards/chosen", "+.3f")
        metrics[f"Held-out reward of rejected{of_set}"] = (f"{prefix}rewards/rejected", "+.3f")
        metrics[f"Held-out accuracy{of_set}"] = (f"{prefix}rewards/accuracies", ".1%")
    return {
        "Loss": [_setting(run, "loss_type") for run in runs],
        "beta": [_setting(run, "beta") for run in runs],
        "Learning rate": [_learning_rate(run) for run in runs],
        "Steps": [_steps(run) for run in runs],
        **{label: [_last(run, key, form) for run in runs] for label, (key, form) in metrics.items()},
        "Separated pairs": [_share(run, "separated") for run in runs],
        "Displaced pairs": [_share(run, "displaced") for run in runs],
    }


def _setting(run: Run, key: str) -> Cell:
    if run.record is None:
        return ("not known",)
    # Only a run on pairs logs regimes; the classes for single answers have other defaults.
    default = f"{_DEFAULTS[key]} (default)" if "apo/separated" in run.log else "default"
    return _cell(run.record["settings"].get(key), default)


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


def _share(run: Run, regime: str) -> Cell:
    if run.pairs is None:
        return ("not evaluated",)
    count = sum(pair["regime"] == regime for pair in run.pairs)
    share, low, high = wilson(count, len(run.pairs))
    return f"{share:.1%}", f"({low:.1%} to {high:.1%})", f"{count:,} of {len(run.pairs):,}"


def _rows(columns: Sequence[Mapping[str, Any]], absent: str) -> Rows:
    keys = sorted({key for column in columns for key in column})
    return {key: [_cell(column.get(key), absent) for column in columns] for key in keys}


def _cell(value: object, absent: str) -> Cell:
    if value is None:
        return (absent,)
    if isinstance(value, list) and value:
        value = ", ".join(map(str, value))
    return (value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False),)
