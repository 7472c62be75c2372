"""The sentences on top of a report: what each run did, and in what one run is better than the others."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from apo_trl.evaluation.intervals import Interval, wilson
from apo_trl.evaluation.provenance import described, trained_in
from apo_trl.evaluation.report.runs import Run, evaluation_sets
from apo_trl.training.movement import hardly_moved, hardly_moved_by_log, movement_of

__all__ = ["SHARES", "comparison", "conclusion", "share", "unmoved"]

_SIDES = ("chosen", "rejected")

SHARES = {
    "separated": "separates more pairs",
    "displaced": "displaces fewer pairs",
    "accuracy": "has more margins above 0",
}
"""The shares of evaluated pairs that are compared, and what a better one is called."""


def share(run: Run, name: str) -> Interval:
    """Compute one of `SHARES` over the evaluated pairs of a run."""
    pairs = run.pairs or ()
    right = [pair["chosen_logratio"] > pair["rejected_logratio"] for pair in pairs]
    held = right if name == "accuracy" else [pair["regime"] == name for pair in pairs]
    return wilson(sum(held), len(held))


def conclusion(run: Run) -> str:
    """Return what a run did, in a sentence: by its evaluated pairs, else by its log."""
    if still := unmoved(run):
        return still
    settings = run.record["settings"] if run.record else {}
    if run.pairs:
        what, source = described([pair["trained_on"] for pair in run.pairs]), f"computed in {run.pairs[0]['dtype']}"
        shares = {name: share(run, name).value for name in SHARES}
        nats = {side: float(np.mean([pair[f"{side}_logratio"] for pair in run.pairs])) for side in _SIDES}
    else:
        beta = _beta(settings)
        prefix = next(iter(evaluation_sets(run.log)), "")
        what = f"the pairs of the last {'evaluation in training' if prefix else 'logged training step'}"
        source = f"trained {trained_in(run.record)}"
        last = {name: [*points.values()][-1] for name, points in run.log.items() if points}
        shares = {name: last.get(f"{prefix}apo/{name}", math.nan) for name in SHARES}
        nats = {side: last.get(f"{prefix}rewards/{side}", math.nan) / (beta or math.nan) for side in _SIDES}
    if not math.isfinite(shares["separated"]):
        return "Which pairs were separated is not known: run `apo-trl evaluate` on this folder."
    text = f"{_loss(settings)} separated {shares['separated']:.0%} of {what} and displaced {shares['displaced']:.0%}"
    moves = [
        f"{side} answers {'rose' if value > 0 else 'fell'} by {abs(value):.1f} nats"
        for side, value in nats.items()
        if math.isfinite(value)
    ]
    return "; ".join([text, *filter(None, [", ".join(moves)]), source]) + "."


def unmoved(run: Run) -> str:
    """Return the sentence of `hardly_moved` for a run: by its evaluated pairs, else by its log."""
    settings = run.record["settings"] if run.record else {}
    now = {"learning_rate": settings.get("learning_rate"), "steps": run.state.get("global_step")}
    if run.pairs:
        return hardly_moved(movement_of(run.pairs), **now)
    return hardly_moved_by_log(_entries(run), beta=_beta(settings), **now)


def _beta(settings: Mapping[str, Any]) -> float:
    return settings["beta"] if isinstance(settings.get("beta"), (int, float)) else math.nan


def _entries(run: Run) -> list[dict[str, float]]:
    steps = sorted({step for points in run.log.values() for step in points})
    return [{name: points[step] for name, points in run.log.items() if step in points} for step in steps]


def _loss(settings: Mapping[str, Any]) -> str:
    losses = settings.get("loss_type")
    names = losses if isinstance(losses, list) else [losses] if losses else []
    return " + ".join(str(name).replace("apo_", "APO-").replace("_", "-") for name in names) or "Training"


def comparison(runs: Sequence[Run]) -> list[str]:
    """Return in what a run is better than all others: only if the intervals of their shares do not overlap."""
    found = []
    for name, better in SHARES.items():
        sign = -1 if name == "displaced" else 1
        ranked = sorted(((share(run, name), run.name) for run in runs), key=lambda each: -sign * each[0].value)
        (best, run), (second, other), *_ = ranked
        if best.low > second.high if sign > 0 else best.high < second.low:
            found.append(f"{run} {better} than {other}: {best.value:.0%} against {second.value:.0%}.")
    return found or ["On none of the shares is one run better than all others: their 95 % intervals overlap."]
