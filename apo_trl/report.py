"""The report of training runs: their logs and evaluations as they lie in the output folders, and figures of them.

`report` makes the page, `draw_report` the one picture of the demo. Every figure shows one run, so that the page can set
several side by side, or one below the other where it is narrow; all of a kind have the same axes. Nothing is told
apart by its colour alone. Needs matplotlib (`pip install 'apo-trl[report]'`), and neither torch nor a model.

Left out on purpose: smoothing, which hides how noisy a run was.
"""

import io
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .files import replacing
from .inputs import InputError

__all__ = ["Log", "Panel", "Run", "draw_report", "report"]

Log = dict[str, dict[int, float]]
"""The values of each logged metric by their step."""


@dataclass(frozen=True)
class Run:
    """One training run, as its output folder tells it.

    `log` comes from `source`, a trainer_state.json, whose other entries are `state`; `record` is run.json and `pairs`
    are the rows of evaluation.parquet, each None where there is no such file. `held_out` names each evaluation set in
    the log by the prefix that its metrics have.
    """

    name: str
    folder: Path
    source: Path
    state: Mapping[str, Any]
    log: Log
    held_out: Mapping[str, str]
    record: Mapping[str, Any] | None
    pairs: Sequence[Mapping[str, Any]] | None


class Panel(NamedTuple):
    """One picture of one run, as PNG with its text alternative; or no picture, and words on what is missing."""

    run: str
    picture: bytes
    text: str
    heading: str = ""
    note: str = ""


class _Line(NamedTuple):
    label: str
    points: Mapping[int, float]
    look: Mapping[str, Any]


class _Look(NamedTuple):
    label: str
    colour: str
    marker: str
    hatch: str


# Okabe and Ito's colours: told apart by colour-blind readers, and most of them in grey by their lightness.
_BLUE, _ORANGE, _GREEN, _VERMILLION, _GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#6E6E6E"
_SIDES = {"chosen": (_BLUE, "-", "full"), "rejected": (_ORANGE, "--", "none")}
_REGIMES = {
    "separated": _Look("separated", _BLUE, "o", ""),
    "both_up": _Look("both up", _GREEN, "^", "///"),
    "displaced": _Look("displaced", _VERMILLION, "v", "\\\\\\"),
    "other": _Look("rest", "#BBBBBB", "s", "..."),
}
_TERMS = [("#000000", "-"), (_BLUE, "--"), (_VERMILLION, "-."), (_GREEN, ":"), ("#CC79A7", (0, (6, 1, 1, 1, 1, 1)))]
_MARKERS = "oD^sv*"
_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "hatch.linewidth": 0.7,
    "text.parse_math": False,  # a name with two dollar signs is a name
}
_SIZE, _DPI = (5.2, 4.1), 200
_SHOWN = 500  # arrows that can still be told apart
_HUGE = 1e30  # matplotlib's arithmetic of margins overflows beyond about 1e300, and nobody reads an axis that long

_TEXTS = ("id", "regime", "prompt", "chosen", "rejected")
_NUMBERS = (
    *("chosen_logratio", "rejected_logratio", "chosen_logratio_per_token", "rejected_logratio_per_token"),
    *("chosen_logp", "rejected_logp", "ref_chosen_logp", "ref_rejected_logp", "chosen_tokens", "rejected_tokens"),
)
_UNLOGGED = "plain TRL does not log them; train with `apo-trl train`, or call `apo_trl.register()` before training"
_UNEVALUATED = (
    "No evaluation.parquet lies in the run's folder: `apo-trl evaluate --model FOLDER --dataset PAIRS` writes it"
    " (a model that is not an adapter needs `--reference` too)."
)


def report(runs: Sequence[str], output: str) -> Path:
    """Make one HTML page of the output folders of training runs, side by side where there are several.

    The page holds its figures itself and asks no other host for anything. The figures are also written as PNG into a
    folder beside it, `<stem>_figures`, from which those of an earlier report are removed. Gives the page's path.

    Raises:
        InputError: A folder has no log that can be read, another file in it is damaged, a run is given twice, the
            output cannot be written, or matplotlib is not installed.
    """
    from .report_page import page

    _need_matplotlib()
    found = [_read_run(Path(folder), name) for folder, name in zip(runs, _names(runs), strict=True)]
    figures = _figures(found)
    path = Path(output)
    _write_pictures(figures, found, path.with_name(f"{path.stem}_figures"))
    with replacing(path) as beside:
        beside.write_text(page(found, figures), encoding="utf-8")
    return path


def draw_report(
    log_history: Sequence[dict[str, Any]], points: Sequence[tuple[float, float]], path: Path, *, beta: float
) -> None:
    """Draw rewards over training, and every held-out pair by what became of its two sides.

    `log_history` is the trainer's; `points` are (chosen, rejected) log-ratios in nats, one for each pair; the picture
    is written to `path` as PNG. Rewards are beta times log-ratios, so that 0 is the anchor in both panels.
    """
    from .metrics import regime

    log = _read_log(log_history)
    lines = _reward_lines(log, _held_out(log))
    rewards = [(beta * chosen, beta * rejected, regime(chosen, rejected)) for chosen, rejected in points]

    def draw(left: Any, right: Any) -> None:
        _draw_lines(left, lines, _step_limits([lines]), _limits(_values(lines), 0), f"mean reward (beta = {beta:g})")
        left.set_title("Rewards over training")
        _draw_plane(right, rewards, _reach(rewards), "reward of")
        right.set_title(f"{len(points)} held-out pairs after training")

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_picture(draw, panels=2))


# Reading a run.


def _names(runs: Sequence[str]) -> list[str]:
    """Name each run by its folder, with as much of the path as tells it from the others."""
    if not runs:
        raise InputError("There is no run to report on; give the output folder of at least one.")
    parts = [Path(os.path.abspath(run)).parts for run in runs]
    for run, mine in zip(runs, parts, strict=True):
        if parts.count(mine) > 1:
            raise InputError(f"The run {run} is given twice; give each folder once.")

    def name(mine: tuple[str, ...]) -> str:
        length = 1
        while sum(other[-length:] == mine[-length:] for other in parts) > 1:
            length += 1
        return "/".join(mine[-length:])

    return [name(mine) for mine in parts]


def _read_run(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give the output folder of a training run.")
    source, state = _read_state(folder)
    log = _read_log(state["log_history"])
    return Run(name, folder, source, state, log, _held_out(log), _read_record(folder), _read_pairs(folder))


def _read_state(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Read the trainer_state.json of a folder, or of its newest checkpoint that has one which is whole."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.partition("-")[2].isdecimal()]
    checkpoints.sort(key=lambda path: int(path.name.partition("-")[2]), reverse=True)
    damaged = None
    for place in (folder, *checkpoints):
        path = place / "trainer_state.json"
        if not path.is_file():
            continue
        state = _json(path)
        if isinstance(state, dict) and isinstance(state.get("log_history"), list):
            return path, state
        damaged = damaged or path
    if damaged:
        raise InputError(f"{damaged} is damaged, and there is no other in {folder}; give the folder of another run.")
    raise InputError(
        f"{folder} has no trainer_state.json, and no checkpoint in it has one; give the output folder of a training run"
        " (`apo-trl train` writes the file at the end, a script of your own with `trainer.save_state()`)."
    )


def _read_record(folder: Path) -> dict[str, Any] | None:
    path = folder / "run.json"
    if not path.exists():
        return None
    record = _json(path)
    if not isinstance(record, dict) or not all(isinstance(record.get(k, {}), dict) for k in ("settings", "versions")):
        raise InputError(f"{path} is damaged; remove it, and the report will say that the settings are not known.")
    return record


def _json(path: Path) -> Any:
    """Read a JSON file, or give None for one that cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _read_log(history: Iterable[Any]) -> Log:
    """Sort the numbers of a log by metric and step; of a step that was logged twice, the last counts."""
    log: Log = {}
    for entry in history:
        step = entry.get("step") if isinstance(entry, Mapping) else None
        if type(step) is not int or not 0 <= step < 10**15:
            continue
        for key, value in entry.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                log.setdefault(key, {})[step] = value if abs(value) < 10**300 else value * math.inf
    return {key: dict(sorted(points.items())) for key, points in log.items()}


def _held_out(log: Log) -> dict[str, str]:
    """Name each evaluation set of a log by its prefix: "eval_", or "eval_<dataset>_" where there are several."""
    found = [re.fullmatch(r"(eval_(?:(.+)_)?)(?:rewards/chosen|loss)", key, re.DOTALL) for key in log]
    return {match[1]: f"held out: {match[2]}" if match[2] else "held out" for match in found if match}


def _read_pairs(folder: Path) -> list[dict[str, Any]] | None:
    path = folder / "evaluation.parquet"
    if not path.exists():
        return None
    import pyarrow as pa
    import pyarrow.parquet as pq

    remedy = "run `apo-trl evaluate` again, or remove the file"
    try:
        # Not read_table, which takes a folder that is named "seed=1" for a column.
        with pq.ParquetFile(path) as file:
            missing = [name for name in (*_TEXTS, *_NUMBERS) if name not in file.schema_arrow.names]
            if missing:
                raise InputError(f"{path} lacks {', '.join(missing)}; {remedy}.")
            table = file.read(columns=[*_TEXTS, *_NUMBERS])
        fields = [(name, pa.string()) for name in _TEXTS] + [(name, pa.float64()) for name in _NUMBERS]
        rows = table.select([name for name, _ in fields]).cast(pa.schema(fields)).to_pylist()
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({str(error).splitlines()[0][:150]}); {remedy}.") from error
    if not rows:
        raise InputError(f"{path} has no pairs; {remedy}.")
    for row in rows:
        if row["regime"] not in _REGIMES:
            raise InputError(f"{path} has {row['regime']!r:.60} as a regime, which is none; {remedy}.")
        row |= {name: math.nan for name in _NUMBERS if row[name] is None}
        row |= {name: "" for name in _TEXTS if row[name] is None}
    return rows  # type: ignore[no-any-return]


# What is drawn, of which the axes are found over all runs.


def _figures(runs: Sequence[Run]) -> dict[str, list[Panel]]:
    """Draw every figure of every run, by kind, in the order of the page."""
    rewards = [_reward_lines(run.log, run.held_out) for run in runs]
    losses = [_loss_lines(run) for run in runs]
    saved = [_saved_lines(run) for run in runs]
    steps = _step_limits([*rewards, *losses, *saved])
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


def _reward_lines(log: Log, held_out: Mapping[str, str]) -> list[_Line]:
    lines = []
    for side, (colour, dashes, fill) in _SIDES.items():
        look = {"color": colour, "linestyle": dashes, "fillstyle": fill}
        lines += _with_held_out(log, held_out, f"rewards/{side}", side, look)
    return lines


def _loss_lines(run: Run) -> list[_Line]:
    lines = []
    plain = dict.fromkeys(key.removeprefix(prefix) for prefix in ("", *run.held_out) for key in run.log)
    for at, key in enumerate(key for key in plain if key == "loss" or key.startswith("loss/")):
        colour, dashes = _TERMS[at % len(_TERMS)]
        lines += _with_held_out(run.log, run.held_out, key, key, {"color": colour, "linestyle": dashes})
    return lines


def _saved_lines(run: Run) -> list[_Line]:
    return _with_held_out(run.log, run.held_out, "apo/tokens_saved", "tokens saved", {"color": _BLUE})


def _with_held_out(log: Log, held_out: Mapping[str, str], key: str, label: str, look: Mapping[str, Any]) -> list[_Line]:
    """Give a metric in training, as a thin line, and on each evaluation set, with a marker of its own."""
    looks: list[tuple[str, str, dict[str, Any]]] = [("", "training", {"linewidth": 1, "alpha": 0.6})]
    for at, (prefix, name) in enumerate(held_out.items()):
        looks.append((prefix, name, {"linewidth": 1.8, "marker": _MARKERS[at % len(_MARKERS)], "markersize": 5}))
    return [
        _Line(f"{_shortened(label)}, {_shortened(name)}", log[prefix + key], {**look, **more})
        for prefix, name, more in looks
        if prefix + key in log
    ]


def _shortened(label: str) -> str:
    label = "".join(letter if letter.isprintable() else " " for letter in label)
    return label if len(label) <= 32 else f"{label[:31]}…"


def _drawable(points: Mapping[int, float]) -> dict[int, float]:
    return {step: value for step, value in points.items() if abs(value) < _HUGE}


def _values(lines: Iterable[_Line]) -> list[float]:
    return [value for line in lines for value in _drawable(line.points).values()]


def _step_limits(runs: Iterable[Sequence[_Line]]) -> tuple[float, float]:
    return 0, max([1, *(step for lines in runs for line in lines for step in line.points)]) * 1.02


def _limits(values: Sequence[float], *included: float | None) -> tuple[float, float]:
    """Give the ends of an axis that shows all values, and what else must be seen, with room at both ends."""
    shown = [*values, *(value for value in included if value is not None)] or [0]
    low, high = min(shown), max(shown)
    room = 0.06 * (high - low) or 0.06 * abs(high) or 0.1
    return low - room, high + room


def _line_panels(
    runs: Sequence[Run], of_runs: Sequence[list[_Line]], steps: tuple[float, float], unit: str, base: float | None,
    missing: str,
) -> list[Panel]:  # fmt: skip
    limits = _limits([value for lines in of_runs for value in _values(lines)], base)
    panels = []
    for run, lines in zip(runs, of_runs, strict=True):
        drawn = [line for line in lines if _drawable(line.points)]
        lost = sum(len(line.points) - len(_drawable(line.points)) for line in lines)
        note = f"{lost} logged values are not finite numbers, and are not drawn." if lost else ""
        if not drawn:
            panels.append(Panel(run.name, b"", missing, note=note))
            continue
        told = "; ".join(f"{line.label}: {_course(_drawable(line.points))}" for line in drawn)
        text = f"{run.name}: {unit} over steps, on an axis from {limits[0]:.3g} to {limits[1]:.3g}. {told}."

        def draw(axes: Any, drawn: list[_Line] = drawn) -> None:
            _draw_lines(axes, drawn, steps, limits, unit, base=base)

        panels.append(Panel(run.name, _picture(draw), text, note=note))
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
        heading = run.held_out.get(prefix, "training pairs, as there are no two evaluations")
        first, last = min(shares), max(shares)
        told = ", ".join(
            f"{look.label} {shares[first][at]:.0%} then {shares[last][at]:.0%}"
            for at, look in enumerate(_REGIMES.values())
        )
        text = f"{run.name}, {heading}: shares of pairs in each regime at step {first} and at step {last}: {told}."

        def draw(axes: Any, shares: Mapping[int, Sequence[float]] = shares) -> None:
            _draw_regimes(axes, shares, steps)

        panels.append(Panel(run.name, _picture(draw), text, heading))
    return panels


def _shares(log: Log, prefix: str) -> dict[int, tuple[float, ...]]:
    """Give the shares of separated, both up, displaced and the rest, at each step where all were logged."""
    names = [f"{prefix}apo/{name}" for name in _REGIMES if name != "other"]
    logged = [_drawable(log.get(name, {})) for name in names]
    found = {step: tuple(points[step] for points in logged) for step in logged[0] if all(step in p for p in logged)}
    return {step: (*shares, max(0.0, 1 - sum(shares))) for step, shares in found.items()}


def _arrow_panels(runs: Sequence[Run]) -> list[Panel]:
    moves = [[_move(pair) for pair in run.pairs or ()] for run in runs]
    finite = [[move for move in each if all(abs(value) < _HUGE for value in move[:4])] for each in moves]
    every = [move for each in finite for move in each]
    across = _limits([x for move in every for x in (move[0], move[2])])
    upward = _limits([y for move in every for y in (move[1], move[3])])
    panels = []
    for run, each in zip(runs, finite, strict=True):
        shown = each[:: math.ceil(len(each) / _SHOWN)] if each else []
        note = _left_out(len(run.pairs or ()) - len(each))
        if len(shown) < len(each):
            note += f" Of {len(each):,} pairs, {len(shown)} are drawn, evenly chosen."

        def draw(axes: Any, shown: list[tuple[Any, ...]] = shown) -> None:
            _draw_arrows(axes, shown)
            axes.set(xlim=across, ylim=upward)

        text = (
            f"{run.name}: log-probs per token of chosen (across, {across[0]:.3g} to {across[1]:.3g}) and rejected"
            f" (upward, {upward[0]:.3g} to {upward[1]:.3g}), an arrow for each pair from the reference to the policy."
            f" {_counts(run)}."
        )
        panels.append(Panel(run.name, _picture(draw), text, note=note) if shown else _no_pairs(run, note))
    return panels


def _move(pair: Mapping[str, Any]) -> tuple[Any, ...]:
    """Give the log-probs per token of chosen and rejected under the reference, then the policy, and the regime."""
    tokens = {side: max(1, pair[f"{side}_tokens"]) for side in _SIDES}
    return (*(pair[f"{who}{side}_logp"] / tokens[side] for who in ("ref_", "") for side in _SIDES), pair["regime"])


def _plane_panels(runs: Sequence[Run]) -> list[Panel]:
    points = [
        [(pair["chosen_logratio"], pair["rejected_logratio"], pair["regime"]) for pair in run.pairs or ()]
        for run in runs
    ]
    finite = [[point for point in each if all(abs(value) < _HUGE for value in point[:2])] for each in points]
    reach = _reach([point for each in finite for point in each])
    panels = []
    for run, each in zip(runs, finite, strict=True):
        note = _left_out(len(run.pairs or ()) - len(each))

        def draw(axes: Any, each: list[tuple[float, float, str]] = each) -> None:
            _draw_plane(axes, each, reach, "log-ratio (nats) of")

        text = (
            f"{run.name}: log-ratios in nats of chosen (across) and rejected (upward), both from {-reach:.3g} to"
            f" {reach:.3g}, a point for each pair, dashed lines at the anchor 0. {_counts(run)}."
        )
        panels.append(Panel(run.name, _picture(draw), text, note=note) if each else _no_pairs(run, note))
    return panels


def _no_pairs(run: Run, note: str) -> Panel:
    return Panel(run.name, b"", _UNEVALUATED if run.pairs is None else note.strip())


def _left_out(pairs: int) -> str:
    return f"{pairs} pairs have log-probs that are not finite numbers, and are not drawn." if pairs else ""


def _counts(run: Run) -> str:
    regimes = [pair["regime"] for pair in run.pairs or ()]
    told = ", ".join(f"{look.label} {regimes.count(name)}" for name, look in _REGIMES.items())
    return f"Of {len(regimes)} pairs: {told}"


def _reach(points: Sequence[tuple[float, float, str]]) -> float:
    return 1.12 * max([0.1, *(abs(value) for point in points for value in point[:2])])


# Drawing on axes.


def _need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError("The report is drawn with matplotlib: run `pip install 'apo-trl[report]'`.") from error


def _picture(draw: Callable[..., None], panels: int = 1) -> bytes:
    """Give as PNG what `draw` puts on empty axes, one for each panel."""
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot, which would choose a backend for the whole process

    written = io.BytesIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in letters that the font lacks
        figure = Figure(figsize=(_SIZE[0] * panels, _SIZE[1]), layout="constrained")
        draw(*figure.subplots(1, panels, squeeze=False)[0])
        figure.savefig(written, format="png", dpi=_DPI)
    return written.getvalue()


def _draw_lines(
    axes: Any, lines: Sequence[_Line], steps: tuple[float, float], limits: tuple[float, float], unit: str,
    *, base: float | None = 0,
) -> None:  # fmt: skip
    if base is not None:
        axes.axhline(base, color=_GREY, linewidth=1, linestyle=(0, (2, 3)))
    for label, points, look in lines:
        shown = _drawable(points)
        every = max(1, len(shown) // 12)  # markers, which would hide a line that has hundreds
        axes.plot(list(shown), list(shown.values()), label=label, markevery=every, **look)
    axes.set(xlabel="step", ylabel=unit, xlim=steps, ylim=limits)
    _legend(axes, columns=2)


def _draw_regimes(axes: Any, shares: Mapping[int, Sequence[float]], steps: tuple[float, float]) -> None:
    below = [0.0] * len(shares)
    for at, look in enumerate(_REGIMES.values()):
        above = [low + share[at] for low, share in zip(below, shares.values(), strict=True)]
        area = {"facecolor": look.colour, "edgecolor": "white", "hatch": look.hatch, "linewidth": 0}
        axes.fill_between(list(shares), below, above, label=look.label, **area)
        axes.plot(list(shares), above, color="white", linewidth=1.2)
        below = above
    axes.set(xlabel="step", ylabel="share of pairs", xlim=steps, ylim=(0, 1))
    _legend(axes, columns=4)


def _draw_arrows(axes: Any, moves: Sequence[tuple[Any, ...]]) -> None:
    faint = 0.9 if len(moves) < 100 else 0.5
    x, y, _, _, _ = zip(*moves, strict=True)
    axes.scatter(x, y, s=12, facecolor="white", edgecolor=_GREY, linewidth=0.8, alpha=faint, label="reference")
    for name, look in _REGIMES.items():
        mine = [move[:4] for move in moves if move[4] == name]
        if mine:
            x, y, to_x, to_y = zip(*mine, strict=True)
            ahead = [b - a for a, b in zip(x, to_x, strict=True)], [b - a for a, b in zip(y, to_y, strict=True)]
            exact = {"angles": "xy", "scale_units": "xy", "scale": 1, "minlength": 0}
            axes.quiver(x, y, *ahead, **exact, units="inches", width=0.012, color=look.colour, alpha=faint)
            _scatter(axes, to_x, to_y, look, f"{look.label} ({len(mine)})", faint)
    axes.set(xlabel="log-prob per token of chosen", ylabel="log-prob per token of rejected")
    _legend(axes, columns=3)


def _draw_plane(axes: Any, points: Sequence[tuple[float, float, str]], reach: float, unit: str) -> None:
    axes.axhline(0, color=_GREY, linewidth=1, linestyle="--")
    axes.axvline(0, color=_GREY, linewidth=1, linestyle="--")
    axes.axline((0, 0), slope=1, color=_GREY, linewidth=0.8, linestyle=":")
    for name, look in _REGIMES.items():
        mine = [point for point in points if point[2] == name]
        if mine:
            label = f"{look.label} ({len(mine)})"
            _scatter(axes, [p[0] for p in mine], [p[1] for p in mine], look, label, 0.9 if len(points) < 100 else 0.6)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), xlabel=f"{unit} chosen", ylabel=f"{unit} rejected")
    corners = {
        (0.98, 0.02, "right"): "separated:\nchosen up, rejected down",
        (0.02, 0.02, "left"): "both down (displaced,\nright of the dotted line)",
        (0.98, 0.98, "right"): "both up",
        (0.02, 0.98, "left"): "reversed",
    }
    for (x, y, side), text in corners.items():
        place = {"transform": axes.transAxes, "ha": side, "va": "top" if y > 0.5 else "bottom"}
        background = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8}
        axes.text(x, y, text, **place, color="#444444", fontsize=8.5, bbox=background)
    _legend(axes, columns=4)


def _scatter(axes: Any, x: Sequence[float], y: Sequence[float], look: _Look, label: str, alpha: float) -> None:
    edge = {"edgecolor": "white", "linewidth": 0.5, "zorder": 3}
    axes.scatter(x, y, s=30, color=look.colour, marker=look.marker, label=label, alpha=alpha, **edge)


def _legend(axes: Any, columns: int) -> None:
    """Put the legend below the axes, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            handles, labels, ncols=columns, loc="upper center", bbox_to_anchor=(0.5, -0.16), columnspacing=1.2,
            handlelength=2.4,
        )  # fmt: skip


# Files.


def _write_pictures(figures: Mapping[str, Sequence[Panel]], runs: Sequence[Run], folder: Path) -> None:
    ours = re.compile(rf"(?:{'|'.join(figures)})(?:-.*)?\.png", re.DOTALL)
    try:
        for old in folder.glob("*.png"):
            if ours.fullmatch(old.name):
                old.unlink()
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror or error}); choose another --output.") from error
    for kind, panels in figures.items():
        for number, panel in enumerate(panels, start=1):
            words = [panel.run, panel.heading.removeprefix("held out: ")] if len(panels) > 1 else []
            name = "-".join([kind, *([f"{number:02}"] if words else []), *filter(None, map(_slug, words))])
            if panel.picture:
                with replacing(folder / f"{name}.png") as beside:
                    beside.write_bytes(panel.picture)


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.")[:60]
