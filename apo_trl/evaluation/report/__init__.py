"""The report of training runs: their logs and evaluations as they lie in the output folders, and figures of them.

`report` makes the page, `draw_report` the one picture of the demo. Every figure shows one run, so that the page can set
several side by side, or one below the other where it is narrow; all of a kind have the same axes. Nothing is told
apart by its colour alone. Needs matplotlib (`pip install 'apo-trl[report]'`), and neither torch nor a model.

Left out on purpose: smoothing, which hides how noisy a run was.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apo_trl.errors import InputError
from apo_trl.evaluation.report.axes import draw_lines, draw_plane, need_matplotlib, picture
from apo_trl.evaluation.report.figures import (
    Panel,
    all_figures,
    axis_limits,
    drawn_values,
    plane_reach,
    reward_lines,
    step_limits,
)
from apo_trl.evaluation.report.runs import held_out, names, read_log, read_run
from apo_trl.io.files import atomic_write

__all__ = ["draw_report", "report"]


def report(runs: Sequence[str], output: str) -> Path:
    """Make one HTML page of the output folders of training runs, side by side where there are several.

    The page holds its figures itself and asks no other host for anything. The figures are also written as PNG into a
    folder beside it, `<stem>_figures`, from which those of an earlier report are removed. Gives the page's path.

    Raises:
        InputError: A folder has no log that can be read, another file in it is damaged, a run is given twice, the
            output cannot be written, or matplotlib is not installed.
    """
    from apo_trl.evaluation.report.page import page

    need_matplotlib()
    found = [read_run(Path(folder), name) for folder, name in zip(runs, names(runs), strict=True)]
    figures = all_figures(found)
    path = Path(output)
    _write_pictures(figures, path.with_name(f"{path.stem}_figures"))
    with atomic_write(path) as beside:
        beside.write_text(page(found, figures), encoding="utf-8")
    return path


def draw_report(
    log_history: Sequence[dict[str, Any]], points: Sequence[tuple[float, float]], path: Path, *, beta: float
) -> None:
    """Draw rewards over training, and every held-out pair by what became of its two sides.

    `log_history` is the trainer's; `points` are (chosen, rejected) log-ratios in nats, one for each pair; the picture
    is written to `path` as PNG. Rewards are beta times log-ratios, so that 0 is the anchor in both panels.
    """
    from apo_trl.metrics import regime

    log = read_log(log_history)
    lines = reward_lines(log, held_out(log))
    rewards = [(beta * chosen, beta * rejected, regime(chosen, rejected)) for chosen, rejected in points]

    def draw(left: Any, right: Any) -> None:
        limits = axis_limits(drawn_values(lines), 0)
        draw_lines(left, lines, step_limits([lines]), limits, f"mean reward (beta = {beta:g})")
        left.set_title("Rewards over training")
        draw_plane(right, rewards, plane_reach(rewards), "reward of")
        right.set_title(f"{len(points)} held-out pairs after training")

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(draw, panels=2))


def _write_pictures(figures: Mapping[str, Sequence[Panel]], folder: Path) -> None:
    ours = re.compile(rf"(?:{'|'.join(figures)})(?:-\d\d.*)?\.png", re.DOTALL)
    try:
        for old in folder.glob("*.png"):
            if ours.fullmatch(old.name):
                old.unlink()
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror or error}); choose another --output.") from error
    for kind, panels in figures.items():
        for number, panel in enumerate(panels, start=1):
            words = [panel.run, panel.heading.partition(": ")[2]] if len(panels) > 1 else []
            name = "-".join([kind, *([f"{number:02}"] if words else []), *filter(None, map(_slug, words))])
            if panel.picture:
                with atomic_write(folder / f"{name}.png") as beside:
                    beside.write_bytes(panel.picture)


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.")[:60]
