"""Win rate of one model against another: a judge compares their answers to every prompt, in both orders."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from apo_trl.errors import InputError
from apo_trl.evaluation.intervals import Interval, wilson
from apo_trl.evaluation.judged import POINTS, count_outcomes, judge_records, no_verdict_lines
from apo_trl.io.files import write_json
from apo_trl.pairs.config.settings import Settings
from apo_trl.pairs.judging import duel
from apo_trl.pairs.llm.requests import Requester, gather_all
from apo_trl.pairs.methods import sample
from apo_trl.pairs.prompts import PromptSource, Record

__all__ = ["compare", "length_controlled", "summarise", "table"]


def compare(settings: Settings) -> dict[str, Any]:
    """Compare the answers of the two policies of `settings`, A and B, by a judge; write and return `compare.json`.

    It has `a`, `b`, the fields of `summarise`, `judge`, `thoughts`, `stopped`, `settings` and `rows`.
    """
    if len(settings.policy) != 2:
        raise InputError(f"policy_model: must be two models, got {len(settings.policy)}. Set --a and --b.")
    results, judged = judge_records(settings, list(PromptSource(settings)), _match)
    rows = [{"id": name, "reason": reason} | (result or {}) for name, reason, _, result in results]
    models = {name: role.public_model for name, role in zip("ab", settings.policy, strict=True)}
    report = {**models, **summarise(rows), **judged, "settings": settings.described(), "rows": rows}
    write_json(settings.folder / "compare.json", report)
    return report


async def _match(requester: Requester, settings: Settings, record: Record, notes: dict[str, Any]) -> dict[str, Any]:
    [a], [b] = await gather_all(*(sample(requester, role, record, 1) for role in settings.policy))
    outcome = await duel(requester, settings, record, a, b, notes)
    return {"outcome": outcome, "a_length": len(a.text), "b_length": len(b.text)}


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Count the outcomes of rows with `outcome`, `a_length` and `b_length`, or with the `reason` of a dropped row.

    Returns:
        `asked`, `judged`, `dropped` by reason, `a_wins`, `b_wins`, `ties`, `orders_disagree` and `invalid`; the
        `win_rate` of A and the `length_controlled` one, each as [value, low, high]; and `mean_lengths` in characters.
        Invalid verdicts and dropped rows do not count in a rate.
    """
    reasons = [row["reason"] for row in rows if row.get("reason")]
    answered = [row for row in rows if not row.get("reason")]
    judged = [row for row in answered if row["outcome"] in POINTS]
    points = [POINTS[row["outcome"]] for row in judged]
    lengths = [(row["a_length"], row["b_length"]) for row in judged]
    return {
        "asked": len(rows),
        "judged": len(judged),
        "dropped": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        **count_outcomes((row["outcome"] for row in answered), "a_wins", "b_wins"),
        "win_rate": list(wilson(sum(points), len(points))) if points else None,
        "length_controlled": list(length_controlled(points, lengths)) if points else None,
        "mean_lengths": [sum(side) / len(judged) for side in zip(*lengths, strict=True)] if judged else None,
    }


def length_controlled(points: Sequence[float], lengths: Sequence[tuple[int, int]], seed: int = 0) -> Interval:
    """Compute the win rate that A would have with answers as long as B's, with its 95 % bootstrap interval.

    A logistic regression of the points on tanh of the length difference in standard deviations, read at a difference of
    zero: the length term of length-controlled AlpacaEval (arXiv 2404.04475). A weak ridge penalty keeps it finite if
    one side wins everything.
    """
    won, difference = np.asarray(points, dtype=float), np.subtract(*np.asarray(lengths, dtype=float).T)
    features = np.stack([np.ones_like(won), np.tanh(difference / (difference.std() or 1.0))], axis=1)
    repeats = np.random.default_rng(seed).multinomial(len(won), np.full(len(won), 1 / len(won)), 1000)
    counts = np.concatenate([np.ones((1, len(won))), repeats])  # how often each pair is in the data, and in the repeats
    weights, penalty = np.zeros((len(counts), 2)), 0.1
    for _ in range(25):  # Newton's method, for all repeats at once
        rates = 1 / (1 + np.exp(-weights @ features.T))
        gradients = (counts * (won - rates)) @ features - penalty * weights
        curvatures = np.einsum("rp,pi,pj->rij", counts * rates * (1 - rates), features, features)
        weights += np.linalg.solve(curvatures + penalty * np.eye(2), gradients[..., None])[..., 0]
    value, *repeated = 1 / (1 + np.exp(-weights[:, 0]))  # with the second feature at 0
    return Interval(float(value), *map(float, np.quantile(repeated, [0.025, 0.975])))


def table(report: Mapping[str, Any]) -> str:
    """Return a report as text for the terminal."""
    lines = [f"A: {report['a']}\nB: {report['b']}", f"{report['asked']:,} prompts, {report['judged']:,} judged"]
    counts = ("a_wins", "b_wins", "ties", "orders_disagree", "invalid")
    lines.append("  " + ", ".join(f"{name.replace('_', ' ')} {report[name]:,}" for name in counts))
    lines += no_verdict_lines(report["dropped"])
    if report["judged"]:
        for name, label in (("win_rate", "A's win rate"), ("length_controlled", "at equal lengths")):
            value, low, high = report[name]
            lines.append(f"  {label:<18}{value:>6.1%}   95 % interval {low:.1%} to {high:.1%}")
        a_length, b_length = report["mean_lengths"]
        lines.append(f"  {'mean length':<18}A {a_length:,.0f}, B {b_length:,.0f} characters")
        lines.append("A tie, and orders that disagree, count half for either side.")
    return "\n".join(lines)
