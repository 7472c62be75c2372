"""Which of two models answers better: every prompt answered by both, judged in both orders, counted and not guessed.

By the machinery that builds pairs: what was asked is stored, a killed run goes on, failures leave the count under their
name.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from apo_trl.errors import InputError
from apo_trl.evaluation.intervals import Interval, wilson
from apo_trl.io.files import write_json
from apo_trl.pairs.build import check_templates, process_all
from apo_trl.pairs.config.settings import Settings
from apo_trl.pairs.judging import duel
from apo_trl.pairs.llm.requests import Dropped, Requester, gather_all
from apo_trl.pairs.llm.response_cache import ResponseCache
from apo_trl.pairs.methods import sample
from apo_trl.pairs.output.writer import judged_summary
from apo_trl.pairs.progress import Progress
from apo_trl.pairs.prompts import PromptSource, Record

__all__ = ["compare", "length_controlled", "summarise", "table"]

_POINTS = {"first": 1.0, "second": 0.0, "tie": 0.5, "disagreement": 0.5}
_REPEATS = 1000  # of the bootstrap


def compare(settings: Settings) -> dict[str, Any]:
    """Let two policies answer every prompt and a judge compare them; writes `compare.json` to `settings.folder`.

    `settings` are those of `off_policy_judge` with two policies, A and B. Gives a report, ready for JSON: `asked`,
    `dropped` by reason, `judged`, the counts `a_wins`, `b_wins`, `ties`, `orders_disagree`, `invalid`; `win_rate` of A
    and `length_controlled`, each [value, low, high]; the mean lengths in characters; `judge`; and `rows`.

    Raises InputError for prompts or models that cannot be used.
    """
    if len(settings.policy) != 2:
        raise InputError(f"Two models can be compared, and {len(settings.policy)} are given; name them by --a and --b.")
    records = list(PromptSource(settings))
    check_templates(settings)
    with ResponseCache(settings.folder) as store:
        servers = process_all(settings, records, store, Progress(len(records)), _match, lambda *row: row[-1])
        ended = list(store.rows())
    rows = [{"id": name, "reason": reason} | (json.loads(row) if row else {}) for name, reason, _, row, _ in ended]
    report = {
        "a": settings.policy[0].public_model,
        "b": settings.policy[1].public_model,
        **summarise(rows),
        "judge": judged_summary(json.loads(notes) for *_, notes in ended),
        "stopped": servers.limits.stopped,
        "settings": settings.described(),
        "rows": rows,
    }
    write_json(settings.folder / "compare.json", report)
    return report


async def _match(asker: Requester, settings: Settings, record: Record, notes: dict[str, Any]) -> dict[str, Any]:
    if record.fault:
        raise Dropped(record.reason or "bad_row", record.fault)
    one, other = [
        answers[0] for answers in await gather_all(*(sample(asker, role, record, 1) for role in settings.policy))
    ]
    outcome = await duel(asker, settings, record, one, other, notes)
    return {"outcome": outcome, "a_length": len(one.text), "b_length": len(other.text)}


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Count what became of every row: `outcome`, `a_length` and `b_length`, or a `reason` for none.

    A tie, and orders that disagree, give half a point to either side (MT-Bench, arXiv 2306.05685); an unreadable
    verdict and a failed request are no part of a rate.
    """
    outcomes = [row["outcome"] for row in rows if not row.get("reason")]
    reasons = [row["reason"] for row in rows if row.get("reason")]
    judged = [row for row in rows if not row.get("reason") and row["outcome"] in _POINTS]
    points = [_POINTS[row["outcome"]] for row in judged]
    lengths = [(row["a_length"], row["b_length"]) for row in judged]
    names = {"a_wins": "first", "b_wins": "second", "ties": "tie", "orders_disagree": "disagreement"}
    return {
        "asked": len(rows),
        "judged": len(judged),
        "dropped": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        **{name: outcomes.count(outcome) for name, outcome in names.items()},
        "invalid": outcomes.count("judge_invalid"),
        "win_rate": list(wilson(sum(points), len(points))) if points else None,
        "length_controlled": list(length_controlled(points, lengths)) if points else None,
        "mean_lengths": [sum(side) / len(judged) for side in zip(*lengths, strict=True)] if judged else None,
    }


def length_controlled(points: Sequence[float], lengths: Sequence[tuple[int, int]], seed: int = 0) -> Interval:
    """Give the win rate that A would have with answers as long as B's, with its 95 % bootstrap interval.

    A logistic regression of the points on tanh of the length difference in standard deviations, read at a difference of
    zero: the length term of length-controlled AlpacaEval (arXiv 2404.04475). A slight pull of both coefficients towards
    0 keeps it finite where one side wins everything.
    """
    won, pairs = np.asarray(points, dtype=float), np.asarray(lengths, dtype=float)
    difference = pairs[:, 0] - pairs[:, 1]
    spread = difference.std() or 1.0
    features = np.stack([np.ones_like(won), np.tanh(difference / spread)], axis=1)
    draw = np.random.default_rng(seed)
    repeats = [_at_zero(features[at], won[at]) for at in draw.integers(0, len(won), (_REPEATS, len(won)))]
    low, high = np.quantile(repeats, [0.025, 0.975])
    return Interval(_at_zero(features, won), float(low), float(high))


def _at_zero(features: "np.ndarray[Any, Any]", won: "np.ndarray[Any, Any]") -> float:
    """Fit by Newton's method and give the win rate where the second feature is 0."""
    weights, pull = np.zeros(2), 0.1
    for _ in range(25):
        rate = 1 / (1 + np.exp(-features @ weights))
        slope = features.T @ (won - rate) - pull * weights
        bend = (features * (rate * (1 - rate))[:, None]).T @ features + pull * np.eye(2)
        step = np.linalg.solve(bend, slope)
        weights += step
        if np.abs(step).max() < 1e-8:
            break
    return float(1 / (1 + np.exp(-weights[0])))


def table(report: Mapping[str, Any]) -> str:
    """Lay out a report for the terminal."""
    counts = ("a_wins", "b_wins", "ties", "orders_disagree", "invalid")
    lines = [f"A: {report['a']}\nB: {report['b']}", f"{report['asked']:,} prompts, {report['judged']:,} judged"]
    lines.append("  " + ", ".join(f"{name.replace('_', ' ')} {report[name]:,}" for name in counts))
    if report["dropped"]:
        lines.append("No verdict: " + ", ".join(f"{count:,} {name}" for name, count in report["dropped"].items()) + ".")
    if report["judged"]:
        for name, words in (("win_rate", "A's win rate"), ("length_controlled", "at equal lengths")):
            value, low, high = report[name]
            lines.append(f"  {words:<18}{value:>6.1%}   95 % interval {low:.1%} to {high:.1%}")
        lines.append(
            "  mean length       "
            + ", ".join(f"{side} {length:,.0f}" for side, length in zip("AB", report["mean_lengths"], strict=True))
            + " characters"
        )
        lines.append("A tie, and orders that disagree, count half for either side.")
    return "\n".join(lines)
