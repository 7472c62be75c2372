"""The figures of a report: one of each kind for each run, with the same axes for all runs.

Colour is never the only difference. Nothing is smoothed, which would hide how noisy a run was.
"""

import io
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from apo_trl.errors import InputError
from apo_trl.evaluation.regimes import REGIMES
from apo_trl.evaluation.report.runs import HUGE, Log, Run, evaluation_sets

__all__ = ["REWARDS", "Panel", "all_figures", "draw_lines", "draw_plane", "png", "style"]

# Okabe and Ito's colours, for colour-blind readers; most differ in lightness too.
_BLUE, _ORANGE, _GREEN, _VERMILLION, _GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#6E6E6E"
_TERMS = [("#000000", "-"), (_BLUE, "--"), (_VERMILLION, "-."), (_GREEN, ":"), ("#CC79A7", (0, (6, 1, 1, 1, 1, 1)))]
_MARKERS = "oD^sv*"  # of evaluation sets
_REGIMES = {  # label, colour, marker, hatch
    "separated": ("separated", _BLUE, "o", ""),
    "both_up": ("both up", _GREEN, "^", "///"),
    "displaced": ("displaced", _VERMILLION, "v", "\\\\\\"),
    "other": ("rest", "#ABABAB", "s", ".."),
}
Metrics = Mapping[str, tuple[str, dict[str, Any]]]  # the label and the look of each metric
REWARDS: Metrics = {
    "rewards/chosen": ("chosen", {"color": _BLUE, "linestyle": "-", "fillstyle": "full"}),
    "rewards/rejected": ("rejected", {"color": _ORANGE, "linestyle": "--", "fillstyle": "none"}),
}


class Panel(NamedTuple):
    """One picture of one run, as PNG with its text alternative; the picture is empty if the run lacks the data."""

    run: str
    heading: str = ""
    text: str = ""
    note: str = ""
    picture: bytes = b""


Drawing = Iterator[tuple[Panel, Any]]  # panels without pictures, and the axes of each, or None


@contextmanager
def style() -> Iterator[None]:
    """Set the look of figures that are drawn and saved inside the context; InputError if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise InputError("matplotlib: required, not installed. Run `pip install 'apo-trl[report]'`.") from error
    with matplotlib.rc_context(fname=Path(__file__).with_name("figures.mplstyle")), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in letters that the font lacks
        yield


def all_figures(runs: Sequence[Run]) -> dict[str, list[Panel]]:
    """Draw every figure of every run, by kind, in the order of the page."""
    steps = _new_axes()
    steps.update_datalim([(0, 0)])
    saved = {"apo/tokens_saved": ("tokens saved", {"color": _BLUE})}
    drawings = {
        "rewards": _lines(runs, steps, REWARDS, "mean reward", 0),
        "regimes": _regimes(runs, steps),
        "pairs": _pairs(runs, _draw_arrows, _logps),
        "plane": _pairs(runs, draw_plane, lambda pair: [[pair["chosen_logratio"], pair["rejected_logratio"]]]),
        "losses": _lines(runs, steps, _terms(runs), "loss"),
        "saved": _lines(runs, steps, saved, "tokens padded / computed", 1),
    }
    # Panels share their limits, so all are drawn before any is saved.
    drawn = {kind: list(panels) for kind, panels in drawings.items()}
    return {kind: [_finish(panel, axes) for panel, axes in panels] for kind, panels in drawn.items()}


def _new_axes(**shared: Any) -> Any:
    from matplotlib.figure import Figure  # not pyplot, which would choose a backend for the whole process

    return Figure().add_subplot(**shared)


def _finish(panel: Panel, axes: Any) -> Panel:
    if axes is None:
        return panel
    axis = "{}, {:.3g} to {:.3g}"
    upward, across = axis.format(axes.get_ylabel(), *axes.get_ylim()), axis.format(axes.get_xlabel(), *axes.get_xlim())
    text = f"{panel.run}: {upward} (upward), over {across} (across). {panel.text}"
    return panel._replace(text=text, picture=png(axes.figure))


def png(figure: Any) -> bytes:
    """Return a figure as a PNG file, with a legend below each of its axes, where it hides nothing."""
    for axes in figure.axes:
        if labels := axes.get_legend_handles_labels()[1]:
            columns = max(1, 70 // (8 + max(map(len, labels))))  # 8 letters for the handle and its gaps
            axes.legend(loc="upper center", bbox_to_anchor=(0.46, -0.17), ncols=columns)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _lines(runs: Sequence[Run], steps: Any, metrics: Metrics, unit: str, anchor: float | None = None) -> Drawing:
    first = _new_axes(sharex=steps)
    for run in runs:
        axes = _new_axes(sharex=first, sharey=first)
        draw_lines(axes, run.log, metrics, unit, anchor)
        lines, _ = axes.get_legend_handles_labels()
        courses = [_course(line.get_label(), *line.get_data()) for line in lines if np.isfinite(line.get_ydata()).any()]
        lost = sum(np.count_nonzero(~np.isfinite(line.get_ydata())) for line in lines)
        note = f"Logged values that are not finite numbers, and so are not drawn: {lost}." if lost else ""
        yield Panel(run.name, text="; ".join(courses), note=note), axes if courses else None


def _course(label: str, steps: Sequence[int], values: Sequence[float]) -> str:
    points = zip(steps, values, strict=True)
    course = [f"{value:.3g} at step {step}" for step, value in points if math.isfinite(value)]
    return f"{label}: from {course[0]} to {course[-1]}" if len(course) > 1 else f"{label}: {course[0]}"


def _terms(runs: Sequence[Run]) -> Metrics:
    keys = [key.removeprefix(prefix) for run in runs for prefix in ("", *evaluation_sets(run.log)) for key in run.log]
    losses = dict.fromkeys(key for key in keys if key == "loss" or key.startswith("loss/"))
    looks = zip(losses, cycle(_TERMS), strict=False)
    return {key: (key, {"color": colour, "linestyle": dashes}) for key, (colour, dashes) in looks}


def draw_lines(axes: Any, log: Log, metrics: Metrics, unit: str, anchor: float | None = None) -> None:
    """Draw each metric in training as a thin line, on each evaluation set with markers, and a line at `anchor`."""
    for key, (label, look) in metrics.items():
        for index, (prefix, source) in enumerate({"": "training", **evaluation_sets(log)}.items()):
            points = log.get(prefix + key)
            if not points:
                continue
            marker = _MARKERS[(index - 1) % len(_MARKERS)] if prefix else "." if len(points) == 1 else ""
            weight = {"linewidth": 1.8, "markersize": 5} if prefix else {"linewidth": 1, "alpha": 0.6}
            every = max(1, len(points) // 12)  # hundreds of markers would hide a line
            name = ", ".join(text if len(text) <= 32 else f"{text[:31]}…" for text in (label, source))
            name = "".join(letter for letter in name if letter.isprintable())
            axes.plot(*zip(*points.items(), strict=True), label=name, marker=marker, markevery=every, **weight, **look)
    if anchor is not None:
        axes.axhline(anchor, color=_GREY, linewidth=1, linestyle=":")
    axes.set(xlabel="step", ylabel=unit)


def _regimes(runs: Sequence[Run], steps: Any) -> Drawing:
    """Stack the shares of the regimes on each evaluation set with two evaluations, or else in training."""
    labels, colours, _, hatches = zip(*_REGIMES.values(), strict=True)
    look = {"labels": labels, "colors": colours, "hatch": hatches, "edgecolor": "white", "linewidth": 1.2}
    for run in runs:
        sets = evaluation_sets(run.log).items()
        names = {prefix: f"Evaluation pairs{name.removeprefix('evaluation')}" for prefix, name in sets}
        shares = {prefix: share for prefix in (*names, "") if len(share := _shares(run.log, prefix)) > 1}
        if not shares:
            yield Panel(run.name), None
        elif len(shares) > 1:
            shares.pop("", None)
        for prefix, share in shares.items():
            heading = names.get(prefix, "Training pairs, as there are not two evaluations")
            axes = _new_axes(sharex=steps)
            values = list(zip(*share.values(), strict=True))
            axes.stackplot(list(share), *values, **look)
            axes.set(xlabel="step", ylabel="share of pairs", ylim=(0, 1))
            courses = [_course(label, list(share), value) for label, value in zip(labels, values, strict=True)]
            yield Panel(run.name, heading, f"{heading}. {'; '.join(courses)}"), axes


def _shares(log: Log, prefix: str) -> dict[int, tuple[float, ...]]:
    """Return the shares of the regimes and of the rest, at each step where all were logged."""
    logged = [log.get(f"{prefix}apo/{name}", {}) for name in REGIMES]
    shares = {step: [points.get(step, math.nan) for points in logged] for step in logged[0]}
    return {step: (*each, max(0.0, 1 - sum(each))) for step, each in shares.items() if math.isfinite(sum(each))}


def _pairs(runs: Sequence[Run], draw: Callable[..., None], points: Callable[[Any], Any]) -> Drawing:
    first = _new_axes()
    for run in runs:
        if run.pairs is None:
            yield Panel(run.name), None
            continue
        places = np.array([points(pair) for pair in run.pairs])  # (pairs, points of a pair, 2)
        regimes = np.array([pair["regime"] for pair in run.pairs])
        finite = np.flatnonzero((np.abs(places) < HUGE).all(axis=(1, 2)))
        drawn = finite[:: max(1, math.ceil(len(finite) / 500))]  # more would overlap
        axes = _new_axes(sharex=first, sharey=first) if len(drawn) else None
        if axes is not None:
            draw(axes, regimes[drawn], *places[drawn].swapaxes(0, 1))
        counts = ", ".join(f"{label} {np.count_nonzero(regimes == name)}" for name, (label, *_) in _REGIMES.items())
        note = f"{len(drawn):,} of {len(regimes):,} pairs are drawn; {len(regimes) - len(finite):,} are not finite."
        yield Panel(run.name, text=f"Of {len(regimes)} pairs: {counts}.", note=note * (len(drawn) < len(regimes))), axes


def _logps(pair: Mapping[str, Any]) -> list[list[float]]:
    tokens = {side: max(1, pair[f"{side}_tokens"]) for side in ("chosen", "rejected")}
    return [[pair[f"{model}{side}_logp"] / tokens[side] for side in tokens] for model in ("ref_", "")]


def _draw_arrows(axes: Any, regimes: Any, start: Any, end: Any) -> None:
    axes.scatter(*start.T, s=12, facecolor="white", edgecolor=_GREY, linewidth=0.8, alpha=0.7, label="reference")
    look = {"color": [_REGIMES[name][1] for name in regimes], "units": "inches", "width": 0.012, "alpha": 0.7}
    axes.quiver(*start.T, *(end - start).T, angles="xy", scale_units="xy", scale=1, minlength=0, **look)
    _scatter(axes, regimes, end)
    axes.set(xlabel="log-prob per token of chosen", ylabel="log-prob per token of rejected", xmargin=0.05)


def draw_plane(axes: Any, regimes: Any, points: Any, unit: str = "log-ratio (nats)") -> None:
    """Draw (chosen, rejected) points, an array of shape (pairs, 2), around the anchors of both sides."""
    for line in (axes.axhline, axes.axvline):
        line(0, color=_GREY, linewidth=1, linestyle="--", zorder=1)
    axes.axline((0, 0), slope=1, color=_GREY, linewidth=0.8, linestyle=":", zorder=1)
    _scatter(axes, regimes, points)
    reach = 1.3 * max(0.1, np.abs(points).max(initial=0))  # a square, with room for the words in its corners
    axes.update_datalim([(-reach, -reach), (reach, reach)])
    axes.locator_params(nbins=6)
    axes.set(xlabel=f"{unit} of chosen", ylabel=f"{unit} of rejected", xmargin=0, ymargin=0)
    corners = {
        ("right", "bottom"): "separated:\nchosen up, rejected down",
        ("left", "bottom"): "both down (displaced,\nright of the dotted line)",
        ("right", "top"): "both up",
        ("left", "top"): "reversed",
    }
    places = {"left": 0.02, "right": 0.98, "bottom": 0.02, "top": 0.98}
    look = {"color": "#444444", "fontsize": 8.5, "transform": axes.transAxes, "zorder": 2}
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8}
    for (ha, va), text in corners.items():
        axes.text(places[ha], places[va], text, ha=ha, va=va, bbox=box, **look)


def _scatter(axes: Any, regimes: Any, points: Any) -> None:
    look = {"s": 30, "alpha": 0.9 if len(points) < 100 else 0.6, "edgecolor": "white", "linewidth": 0.5, "zorder": 3}
    for name, (label, colour, marker, _) in _REGIMES.items():
        x, y = points[regimes == name].T
        if len(x):
            axes.scatter(x, y, color=colour, marker=marker, label=f"{label} ({len(x)})", **look)
