"""The report of training runs: one page of their logs and evaluations, with figures.

Needs matplotlib (`pip install 'apo-trl[report]'`), and neither torch nor a model.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from apo_trl.evaluation.regimes import regime
from apo_trl.evaluation.report.figures import REWARDS, Panel, all_figures, draw_lines, draw_plane, png, style
from apo_trl.evaluation.report.page import page
from apo_trl.evaluation.report.runs import names, read_log, read_run
from apo_trl.evaluation.report.scores import is_scored, read_scores, scores_page
from apo_trl.io.files import atomic_write

__all__ = ["draw_report", "report"]


def report(runs: Sequence[str], output: str) -> Path:
    """Write an HTML page that compares training runs, or scores, given by their output folders, and return its path.

    The page loads nothing from other files or hosts. Its figures are also written as PNG into `<stem>_figures` beside
    it, instead of those of an earlier report.
    """
    path, named = Path(output), [(Path(folder), name) for folder, name in zip(runs, names(runs), strict=True)]
    if all(is_scored(folder) for folder, _ in named):
        html = scores_page([read_scores(*each) for each in named])
    else:
        loaded = [read_run(folder, name) for folder, name in named]
        with style():
            figures = all_figures(loaded)
        _write_pictures(figures, path.with_name(f"{path.stem}_figures"))
        html = page(loaded, figures)
    with atomic_write(path) as beside:
        beside.write_text(html, encoding="utf-8")
    return path


def _write_pictures(figures: Mapping[str, Sequence[Panel]], folder: Path) -> None:
    written = set()
    for kind, panels in figures.items():
        for number, panel in enumerate(panels, start=1):
            words = f"{kind}-{number:02} {panel.run} {panel.heading.partition(': ')[2]}" if len(panels) > 1 else kind
            path = folder / (re.sub(r"[^A-Za-z0-9._]+", "-", words)[:120].strip("-.") + ".png")
            if panel.picture:
                with atomic_write(path) as beside:
                    beside.write_bytes(panel.picture)
                written.add(path)
    for path in {*folder.glob("*.png")} - written:
        if re.fullmatch(rf"(?:{'|'.join(figures)})(?:-\d\d.*)?\.png", path.name, re.DOTALL) and path.is_file():
            path.unlink()


def draw_report(
    log_history: Sequence[dict[str, Any]], points: Sequence[tuple[float, float]], path: Path, *, beta: float
) -> None:
    """Draw the rewards in a trainer's `log_history` beside the held-out pairs after training, as a PNG file.

    `points` are the log-ratios of chosen and rejected of each pair, in nats; `beta` turns them into rewards.
    """
    regimes = np.array([regime(chosen, rejected) for chosen, rejected in points])
    with style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11.4, 3.7))
        left, right = figure.subplots(1, 2)
        draw_lines(left, read_log(log_history), REWARDS, f"mean reward (beta = {beta:g})", anchor=0)
        left.set_title("Rewards over training")
        draw_plane(right, regimes, beta * np.array(points, dtype=float), "reward")
        right.set_title(f"{len(points)} held-out pairs after training")
        with atomic_write(path) as beside:
            beside.write_bytes(png(figure))
