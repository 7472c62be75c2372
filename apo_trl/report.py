"""Figures of a run. Needs matplotlib (`pip install 'apo-trl[report]'`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["draw_report"]

# Okabe and Ito's blue and orange: told apart by colour-blind readers, and in grey by their lightness.
_CHOSEN, _REJECTED, _GREY = "#0072B2", "#E69F00", "#777777"


def draw_report(
    log_history: Sequence[dict[str, Any]], points: Sequence[tuple[float, float]], path: Path, *, beta: float
) -> None:
    """Draw rewards over training, and every held-out pair by what became of its two sides.

    `log_history` is the trainer's; `points` are (chosen, rejected) log-ratios in nats, one for each pair; the picture
    is written to `path` as PNG. Rewards are beta times log-ratios, so that 0 is the anchor in both panels.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for side, colour in (("chosen", _CHOSEN), ("rejected", _REJECTED)):
        for prefix, style, label in (
            ("", {"alpha": 0.45}, "training"),
            ("eval_", {"marker": "o"}, "held out"),
        ):
            key = f"{prefix}rewards/{side}"
            # The evaluation after training logs the last step a second time.
            values = {entry["step"]: entry[key] for entry in log_history if key in entry}
            left.plot(list(values), list(values.values()), color=colour, label=f"{side}, {label}", **style)
    left.axhline(0, color=_GREY, linewidth=1, linestyle="--")
    left.set(xlabel="step", ylabel=f"mean reward (beta = {beta:g})", title="Rewards over training")
    left.legend(frameon=False, fontsize=9)

    chosen, rejected = ([beta * point[side] for point in points] for side in (0, 1))
    right.axhline(0, color=_GREY, linewidth=1, linestyle="--")
    right.axvline(0, color=_GREY, linewidth=1, linestyle="--")
    right.axline((0, 0), slope=1, color=_GREY, linewidth=0.8, linestyle=":")
    right.scatter(chosen, rejected, color=_CHOSEN, edgecolor="white", s=45, zorder=3)
    reach = 1.12 * max([0.1, *(abs(value) for value in (*chosen, *rejected))])
    right.set(xlim=(-reach, reach), ylim=(-reach, reach), xlabel="reward of chosen", ylabel="reward of rejected")
    right.set_title(f"{len(points)} held-out pairs after training")
    corners = {
        (0.98, 0.02, "right"): "separated:\nchosen up, rejected down",
        (0.02, 0.02, "left"): "both down (displaced,\nright of the dotted line)",
        (0.98, 0.98, "right"): "both up",
        (0.02, 0.98, "left"): "reversed",
    }
    for (x, y, side), text in corners.items():
        place = {"transform": right.transAxes, "ha": side, "va": "top" if y > 0.5 else "bottom"}
        background = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        right.text(x, y, text, **place, color=_GREY, fontsize=9, bbox=background)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
