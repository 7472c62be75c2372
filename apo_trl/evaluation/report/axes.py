"""What a figure of a report looks like: colours, markers and hatches, and what is drawn on axes.

Nothing is told apart by its colour alone. Needs matplotlib (`pip install 'apo-trl[report]'`).
"""

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from apo_trl.errors import InputError

__all__ = [
    "BLUE",
    "HUGE",
    "MARKERS",
    "REGIMES",
    "SIDES",
    "TERMS",
    "Line",
    "Look",
    "draw_arrows",
    "draw_lines",
    "draw_plane",
    "draw_regimes",
    "drawable",
    "need_matplotlib",
    "picture",
]


class Line(NamedTuple):
    """One metric over steps, and how its line looks."""

    label: str
    points: Mapping[int, float]
    look: Mapping[str, Any]


class Look(NamedTuple):
    """How a regime looks, wherever it is drawn."""

    label: str
    colour: str
    marker: str
    hatch: str


# Okabe and Ito's colours: told apart by colour-blind readers, and most of them in grey by their lightness.
BLUE, _ORANGE, _GREEN, _VERMILLION, _GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#6E6E6E"
SIDES = {"chosen": (BLUE, "-", "full"), "rejected": (_ORANGE, "--", "none")}
REGIMES = {
    "separated": Look("separated", BLUE, "o", ""),
    "both_up": Look("both up", _GREEN, "^", "///"),
    "displaced": Look("displaced", _VERMILLION, "v", "\\\\\\"),
    "other": Look("rest", "#ABABAB", "s", ".."),
}
TERMS = [("#000000", "-"), (BLUE, "--"), (_VERMILLION, "-."), (_GREEN, ":"), ("#CC79A7", (0, (6, 1, 1, 1, 1, 1)))]
MARKERS = "oD^sv*"
_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "hatch.linewidth": 0.7,
    "text.parse_math": False,  # a name with two dollar signs is a name
}
_SIZE, _DPI = (4.9, 3.4), 200
HUGE = 1e30  # matplotlib's arithmetic of margins overflows beyond about 1e300, and nobody reads an axis that long


def drawable(points: Mapping[int, float]) -> dict[int, float]:
    """Leave out what is not finite, or too large for an axis."""
    return {step: value for step, value in points.items() if abs(value) < HUGE}


def need_matplotlib() -> None:
    """Raise InputError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError("The report is drawn with matplotlib: run `pip install 'apo-trl[report]'`.") from error


def picture(draw: Callable[..., None], panels: int = 1) -> bytes:
    """Give as PNG what `draw` puts on empty axes, one for each panel."""
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot, which would choose a backend for the whole process

    written = io.BytesIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in letters that the font lacks
        width, height = _SIZE[0] * panels, _SIZE[1]
        figure: Any = Figure(figsize=(width, height), layout="constrained")
        draw(*figure.subplots(1, panels, squeeze=False)[0])
        # Room for legends is added below, so that axes are equally large whatever a legend says.
        legends = [axes.get_legend() for axes in figure.axes if axes.get_legend()]
        below = max([0, *(legend.get_window_extent().height / figure.dpi + 0.08 for legend in legends)])
        figure.set_size_inches(width, height + below)
        figure.get_layout_engine().set(rect=(0, below / (height + below), 1, height / (height + below)))
        figure.savefig(written, format="png", dpi=_DPI)
    return written.getvalue()


def draw_lines(
    axes: Any, lines: Sequence[Line], steps: tuple[float, float], limits: tuple[float, float], unit: str,
    *, base: float | None = 0,
) -> None:  # fmt: skip
    """Draw lines over steps, and the dotted one of their anchor at `base`."""
    if base is not None:
        axes.axhline(base, color=_GREY, linewidth=1, linestyle=(0, (2, 3)))
    for label, points, look in lines:
        shown = drawable(points)
        every = max(1, len(shown) // 12)  # markers, which would hide a line that has hundreds
        alone = {"marker": "."} if len(shown) == 1 else {}  # a line needs two points
        axes.plot(list(shown), list(shown.values()), label=label, markevery=every, **{**alone, **look})
    axes.set(xlabel="step", ylabel=unit, xlim=steps, ylim=limits)
    _legend(axes)


def draw_regimes(axes: Any, shares: Mapping[int, Sequence[float]], steps: tuple[float, float]) -> None:
    """Stack the shares of the regimes at each step."""
    below = [0.0] * len(shares)
    for at, look in enumerate(REGIMES.values()):
        above = [low + share[at] for low, share in zip(below, shares.values(), strict=True)]
        area = {"facecolor": look.colour, "edgecolor": "white", "hatch": look.hatch, "linewidth": 0}
        axes.fill_between(list(shares), below, above, label=look.label, **area)
        axes.plot(list(shares), above, color="white", linewidth=1.2)
        below = above
    axes.set(xlabel="step", ylabel="share of pairs", xlim=steps, ylim=(0, 1))
    _legend(axes)


def draw_arrows(axes: Any, moves: Sequence[tuple[Any, ...]]) -> None:
    """Draw an arrow for each (x, y, to_x, to_y, regime)."""
    faint = 0.9 if len(moves) < 100 else 0.5
    x, y, _, _, _ = zip(*moves, strict=True)
    axes.scatter(x, y, s=12, facecolor="white", edgecolor=_GREY, linewidth=0.8, alpha=faint, label="reference")
    for name, look in REGIMES.items():
        mine = [move[:4] for move in moves if move[4] == name]
        if mine:
            x, y, to_x, to_y = zip(*mine, strict=True)
            ahead = [b - a for a, b in zip(x, to_x, strict=True)], [b - a for a, b in zip(y, to_y, strict=True)]
            exact = {"angles": "xy", "scale_units": "xy", "scale": 1, "minlength": 0}
            axes.quiver(x, y, *ahead, **exact, units="inches", width=0.012, color=look.colour, alpha=faint)
            _scatter(axes, to_x, to_y, look, f"{look.label} ({len(mine)})", faint)
    axes.set(xlabel="log-prob per token of chosen", ylabel="log-prob per token of rejected")
    _legend(axes)


def draw_plane(axes: Any, points: Sequence[tuple[float, float, str]], reach: float, unit: str) -> None:
    """Draw (chosen, rejected, regime) around the anchors of both sides."""
    axes.axhline(0, color=_GREY, linewidth=1, linestyle="--", zorder=1)
    axes.axvline(0, color=_GREY, linewidth=1, linestyle="--", zorder=1)
    axes.axline((0, 0), slope=1, color=_GREY, linewidth=0.8, linestyle=":", zorder=1)
    for name, look in REGIMES.items():
        mine = [point for point in points if point[2] == name]
        if mine:
            label = f"{look.label} ({len(mine)})"
            _scatter(axes, [p[0] for p in mine], [p[1] for p in mine], look, label, 0.9 if len(points) < 100 else 0.6)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), xlabel=f"{unit} chosen", ylabel=f"{unit} rejected")
    axes.locator_params(nbins=6)
    corners = {
        (0.98, 0.02, "right"): "separated:\nchosen up, rejected down",
        (0.02, 0.02, "left"): "both down (displaced,\nright of the dotted line)",
        (0.98, 0.98, "right"): "both up",
        (0.02, 0.98, "left"): "reversed",
    }
    for (x, y, side), text in corners.items():
        place = {"transform": axes.transAxes, "ha": side, "va": "top" if y > 0.5 else "bottom"}
        background = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8}
        axes.text(x, y, text, **place, color="#444444", fontsize=8.5, bbox=background, zorder=2)
    _legend(axes)


def _scatter(axes: Any, x: Sequence[float], y: Sequence[float], look: Look, label: str, alpha: float) -> None:
    edge = {"edgecolor": "white", "linewidth": 0.5, "zorder": 3}
    axes.scatter(x, y, s=30, color=look.colour, marker=look.marker, label=label, alpha=alpha, **edge)


def _legend(axes: Any) -> None:
    """Put the legend below the axes, where it hides nothing, in as many columns as there is room for."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        inches = 0.55 + 0.068 * max(map(len, labels))  # a handle with its gaps, and letters of 9 points
        columns = max(1, min(len(labels), int(_SIZE[0] / inches)))
        place = {"loc": "upper center", "bbox_to_anchor": (0.46, -0.17), "columnspacing": 1.2, "handlelength": 2.4}
        axes.legend(handles, labels, ncols=columns, **place).set_in_layout(False)
