"""The figures of a report, each of one run, and all of a kind with the same axes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from apo_trl.evaluation.report.axes import (
    BLUE,
    HUGE,
    MARKERS,
    REGIMES,
    SIDES,
    TERMS,
    Line,
    draw_arrows,
    draw_lines,
    draw_plane,
    draw_regimes,
    drawable,
    picture,
)
from apo_trl.evaluation.report.runs import Log, Run

__all__ = ["Panel", "all_figures", "axis_limits", "drawn_values", "plane_reach", "reward_lines", "step_limits"]


class Panel(NamedTuple):
    """One picture of one run, as PNG with its text alternative; or no picture, and words on what is missing."""

    run: str
    picture: bytes
    text: str
    heading: str = ""
    note: str = ""


_SHOWN = 500  # arrows that can still be told apart
_UNLOGGED = "plain TRL does not log them; train with `apo-trl train`, or call `apo_trl.register()` before training"
_UNEVALUATED = (
    "No evaluation.parquet lies in the run's folder: `apo-trl evaluate --model FOLDER --dataset PAIRS` writes it"
    " (a model that is not an adapter needs `--reference` too)."
)


def all_figures(runs: Sequence[Run]) -> dict[str, list[Panel]]:
    """Draw every figure of every run, by kind, in the order of the page."""
    rewards = [reward_lines(run.log, run.held_out) for run in runs]
    losses = [_loss_lines(run) for run in runs]
    saved = [_saved_lines(run) for run in runs]
    steps = step_limits([*rewards, *losses, *saved])
    return {
        "rewards": _line_panels(runs, rewards, steps, "mean reward", 0, "No rewards were logged."),
        "regimes": [panel for run in runs for panel in _regime_panels(run, steps)],
        "pairs": _arrow_panels(runs),
        "plane": _plane_panels(runs),
        "losses": _line_panels(runs, losses, steps, "loss", None, "No losses were logged."),
        "saved": _line_panels(
            runs, saved, steps, "tokens padded / computed", 1,
            "No tokens saved were logged, which only `padding_free` does.",
        ),
    }  # fmt: skip


def reward_lines(log: Log, held_out: Mapping[str, str]) -> list[Line]:
    """Give the rewards of both sides, in training and held out."""
    lines = []
    for side, (colour, dashes, fill) in SIDES.items():
        look = {"color": colour, "linestyle": dashes, "fillstyle": fill}
        lines += _with_held_out(log, held_out, f"rewards/{side}", side, look)
    return lines


def _loss_lines(run: Run) -> list[Line]:
    lines = []
    plain = dict.fromkeys(key.removeprefix(prefix) for prefix in ("", *run.held_out) for key in run.log)
    for at, key in enumerate(key for key in plain if key == "loss" or key.startswith("loss/")):
        colour, dashes = TERMS[at % len(TERMS)]
        lines += _with_held_out(run.log, run.held_out, key, key, {"color": colour, "linestyle": dashes})
    return lines


def _saved_lines(run: Run) -> list[Line]:
    return _with_held_out(run.log, run.held_out, "apo/tokens_saved", "tokens saved", {"color": BLUE})


def _with_held_out(log: Log, held_out: Mapping[str, str], key: str, label: str, look: Mapping[str, Any]) -> list[Line]:
    """Give a metric in training, as a thin line, and on each evaluation set, with a marker of its own."""
    looks: list[tuple[str, str, dict[str, Any]]] = [("", "training", {"linewidth": 1, "alpha": 0.6})]
    for at, (prefix, name) in enumerate(held_out.items()):
        looks.append((prefix, name, {"linewidth": 1.8, "marker": MARKERS[at % len(MARKERS)], "markersize": 5}))
    return [
        Line(f"{_shortened(label)}, {_shortened(name)}", log[prefix + key], {**look, **more})
        for prefix, name, more in looks
        if prefix + key in log
    ]


def _shortened(label: str) -> str:
    label = "".join(letter if letter.isprintable() else " " for letter in label)
    return label if len(label) <= 32 else f"{label[:31]}…"


def drawn_values(lines: Iterable[Line]) -> list[float]:
    """Give every value of several lines that can be drawn."""
    return [value for line in lines for value in drawable(line.points).values()]


def step_limits(runs: Iterable[Sequence[Line]]) -> tuple[float, float]:
    """Give the ends of the axis of steps that all runs share."""
    last = max([1, *(step for lines in runs for line in lines for step in line.points)])
    return -0.015 * last, 1.02 * last  # room for the markers at both ends


def axis_limits(values: Sequence[float], *included: float | None) -> tuple[float, float]:
    """Give the ends of an axis that shows all values, and what else must be seen, with room at both ends."""
    shown = [*values, *(value for value in included if value is not None)] or [0]
    low, high = min(shown), max(shown)
    room = 0.06 * (high - low) or 0.06 * abs(high) or 0.1
    return low - room, high + room


def _line_panels(
    runs: Sequence[Run], of_runs: Sequence[list[Line]], steps: tuple[float, float], unit: str, base: float | None,
    missing: str,
) -> list[Panel]:  # fmt: skip
    limits = axis_limits([value for lines in of_runs for value in drawn_values(lines)], base)
    panels = []
    for run, lines in zip(runs, of_runs, strict=True):
        drawn = [line for line in lines if drawable(line.points)]
        lost = sum(len(line.points) - len(drawable(line.points)) for line in lines)
        note = f"Logged values that are not finite numbers, and so are not drawn: {lost}." if lost else ""
        if not drawn:
            panels.append(Panel(run.name, b"", missing, note=note))
            continue
        told = "; ".join(f"{line.label}: {_course(drawable(line.points))}" for line in drawn)
        text = f"{run.name}: {unit} over steps, on an axis from {limits[0]:.3g} to {limits[1]:.3g}. {told}."

        def draw(axes: Any, drawn: list[Line] = drawn) -> None:
            draw_lines(axes, drawn, steps, limits, unit, base=base)

        panels.append(Panel(run.name, picture(draw), text, note=note))
    return panels


def _course(points: Mapping[int, float]) -> str:
    first, last = min(points), max(points)
    ends = f"{points[last]:.3g} at step {last}"
    return ends if first == last else f"from {points[first]:.3g} at step {first} to {ends}"


def _regime_panels(run: Run, steps: tuple[float, float]) -> list[Panel]:
    """Draw the shares of the regimes on each evaluation set that was looked at twice, or else in training."""
    sources = {prefix: _shares(run.log, prefix) for prefix in (*run.held_out, "")}
    sources = {prefix: shares for prefix, shares in sources.items() if len(shares) > 1}
    if not sources:
        words = "The regimes were logged for fewer than two steps."
        logged = any("apo/separated" in key for key in run.log)
        return [Panel(run.name, b"", words if logged else f"The regimes were not logged: {_UNLOGGED}.")]
    panels = []
    for prefix, shares in sources.items():
        if not prefix and len(sources) > 1:
            continue
        heading = "Training pairs, as there are not two evaluations"
        if prefix:
            heading = f"Held-out pairs{run.held_out[prefix].removeprefix('held out')}"
        first, last = min(shares), max(shares)
        told = ", ".join(
            f"{look.label} {shares[first][at]:.0%} then {shares[last][at]:.0%}"
            for at, look in enumerate(REGIMES.values())
        )
        text = f"{run.name}, {heading}: shares of pairs in each regime at step {first} and at step {last}: {told}."

        def draw(axes: Any, shares: Mapping[int, Sequence[float]] = shares) -> None:
            draw_regimes(axes, shares, steps)

        panels.append(Panel(run.name, picture(draw), text, heading))
    return panels


def _shares(log: Log, prefix: str) -> dict[int, tuple[float, ...]]:
    """Give the shares of separated, both up, displaced and the rest, at each step where all were logged."""
    names = [f"{prefix}apo/{name}" for name in REGIMES if name != "other"]
    logged = [drawable(log.get(name, {})) for name in names]
    found = {step: tuple(points[step] for points in logged) for step in logged[0] if all(step in p for p in logged)}
    return {step: (*shares, max(0.0, 1 - sum(shares))) for step, shares in found.items()}


def _arrow_panels(runs: Sequence[Run]) -> list[Panel]:
    moves = [[_move(pair) for pair in run.pairs or ()] for run in runs]
    finite = [[move for move in each if all(abs(value) < HUGE for value in move[:4])] for each in moves]
    every = [move for each in finite for move in each]
    across = axis_limits([x for move in every for x in (move[0], move[2])])
    upward = axis_limits([y for move in every for y in (move[1], move[3])])
    panels = []
    for run, each in zip(runs, finite, strict=True):
        shown = each[:: math.ceil(len(each) / _SHOWN)] if each else []
        note = _left_out(len(run.pairs or ()) - len(each))
        if len(shown) < len(each):
            note += f" Of {len(each):,} pairs, {len(shown)} are drawn, evenly chosen."

        def draw(axes: Any, shown: list[tuple[Any, ...]] = shown) -> None:
            draw_arrows(axes, shown)
            axes.set(xlim=across, ylim=upward)

        text = (
            f"{run.name}: log-probs per token of chosen (across, {across[0]:.3g} to {across[1]:.3g}) and rejected"
            f" (upward, {upward[0]:.3g} to {upward[1]:.3g}), an arrow for each pair from the reference to the policy."
            f" {_counts(run)}."
        )
        panels.append(Panel(run.name, picture(draw), text, note=note) if shown else _no_pairs(run, note))
    return panels


def _move(pair: Mapping[str, Any]) -> tuple[Any, ...]:
    """Give the log-probs per token of chosen and rejected under the reference, then the policy, and the regime."""
    tokens = {side: max(1, pair[f"{side}_tokens"]) for side in SIDES}
    return (*(pair[f"{who}{side}_logp"] / tokens[side] for who in ("ref_", "") for side in SIDES), pair["regime"])


def _plane_panels(runs: Sequence[Run]) -> list[Panel]:
    points = [
        [(pair["chosen_logratio"], pair["rejected_logratio"], pair["regime"]) for pair in run.pairs or ()]
        for run in runs
    ]
    finite = [[point for point in each if all(abs(value) < HUGE for value in point[:2])] for each in points]
    reach = plane_reach([point for each in finite for point in each])
    panels = []
    for run, each in zip(runs, finite, strict=True):
        note = _left_out(len(run.pairs or ()) - len(each))

        def draw(axes: Any, each: list[tuple[float, float, str]] = each) -> None:
            draw_plane(axes, each, reach, "log-ratio (nats) of")

        text = (
            f"{run.name}: log-ratios in nats of chosen (across) and rejected (upward), both from {-reach:.3g} to"
            f" {reach:.3g}, a point for each pair, dashed lines at the anchor 0. {_counts(run)}."
        )
        panels.append(Panel(run.name, picture(draw), text, note=note) if each else _no_pairs(run, note))
    return panels


def _no_pairs(run: Run, note: str) -> Panel:
    return Panel(run.name, b"", _UNEVALUATED if run.pairs is None else note.strip())


def _left_out(pairs: int) -> str:
    return f"Pairs whose log-probs are not finite numbers, and so are not drawn: {pairs}." if pairs else ""


def _counts(run: Run) -> str:
    regimes = [pair["regime"] for pair in run.pairs or ()]
    told = ", ".join(f"{look.label} {regimes.count(name)}" for name, look in REGIMES.items())
    return f"Of {len(regimes)} pairs: {told}"


def plane_reach(points: Sequence[tuple[float, float, str]]) -> float:
    """Give how far a square around 0 must reach to show all points, with room for words in its corners."""
    return 1.3 * max([0.1, *(abs(value) for point in points for value in point[:2])])
