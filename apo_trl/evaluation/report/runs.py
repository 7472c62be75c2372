"""Training runs as their output folders show them: the log, the settings, the evaluated pairs."""

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from apo_trl.errors import InputError
from apo_trl.evaluation.provenance import read_record
from apo_trl.evaluation.regimes import REGIMES
from apo_trl.io.files import read_json
from apo_trl.io.resources import nearest_path

__all__ = ["HUGE", "Log", "Run", "evaluation_sets", "names", "read_log", "read_run"]

HUGE = 1e30  # matplotlib's arithmetic of margins overflows beyond about 1e300, and nobody reads an axis that long

Log = dict[str, dict[int, float]]  # the values of each logged metric by their step


class Run(NamedTuple):
    """One training run: its log, the other entries of the log's `source`, run.json, and evaluation.parquet if any."""

    name: str
    folder: Path
    source: Path
    state: Mapping[str, Any]
    log: Log
    record: Mapping[str, Any] | None
    pairs: Sequence[Mapping[str, Any]] | None


_TEXTS = ("id", "regime", "prompt", "chosen", "rejected")
_NUMBERS = (
    *("chosen_logratio", "rejected_logratio", "chosen_logratio_per_token", "rejected_logratio_per_token"),
    *("chosen_logp", "rejected_logp", "ref_chosen_logp", "ref_rejected_logp", "chosen_tokens", "rejected_tokens"),
)


def names(runs: Sequence[str]) -> list[str]:
    """Return the name of each run: that of its folder, with as much of the path as makes it unique."""
    paths = [Path(os.path.abspath(run)).parts for run in runs]
    if len(set(paths)) < len(paths):
        raise InputError(f"runs: duplicate folder, got {', '.join(runs)}. Set each folder once.")
    unique = []
    for path in paths:
        ends = (path[-length:] for length in range(1, len(path) + 1))
        unique.append("/".join(next(end for end in ends if sum(other[-len(end) :] == end for other in paths) == 1)))
    return unique


def read_run(folder: Path, name: str) -> Run:
    """Read the files in the folder of a run; InputError if the log is missing or a file is damaged."""
    source, state = _read_state(folder)
    return Run(name, folder, source, state, read_log(state["log_history"]), read_record(folder), _read_pairs(folder))


def _read_state(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Read the trainer_state.json of a folder, or of its newest checkpoint with an undamaged one."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.partition("-")[2].isdecimal()]
    checkpoints.sort(key=lambda path: int(path.name.partition("-")[2]), reverse=True)
    for path in (place / "trainer_state.json" for place in (folder, *checkpoints)):
        state = read_json(path)
        if isinstance(state, dict) and isinstance(state.get("log_history"), list):
            return path, state
    inside = sorted({str(path.parent) for path in folder.glob("*/trainer_state.json")})
    remedy = "Set the output folder of a training run; your own script writes the file with `trainer.save_state()`."
    remedy = f" Set {' or '.join(inside[:3])}." if inside else f"{nearest_path(str(folder))} {remedy}"
    raise InputError(f"runs: no readable trainer_state.json in {folder} or its checkpoints.{remedy}")


def read_log(history: Iterable[Any]) -> Log:
    """Return the numbers of a trainer's log by metric and step; of a step that was logged twice, the last counts."""
    log: Log = {}
    for entry in history:
        step = entry.get("step") if isinstance(entry, Mapping) else None
        if type(step) is not int or not 0 <= step < 10**15:
            continue
        of_set = next((key.removesuffix("runtime") for key in entry if re.fullmatch("eval_.+_runtime", key)), "eval_")
        for name, value in entry.items():
            # TRL alone logs most metrics of every evaluation set as "eval_".
            key = re.sub("^eval_", of_set, name) if not name.startswith(of_set) else name
            if key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                infinite = math.inf if value > 0 else -math.inf
                log.setdefault(key, {})[step] = infinite if abs(value) > HUGE else float(value)
    return {key: dict(sorted(points.items())) for key, points in log.items()}


def evaluation_sets(log: Log) -> dict[str, str]:
    """Return the name of each evaluation set by its prefix: "eval_", or "eval_<dataset>_" if there are several."""
    matches = [re.fullmatch(r"(eval_(?:(.+)_)?)(?:rewards/chosen|loss)", key, re.DOTALL) for key in log]
    return {match[1]: f"evaluation: {match[2]}" if match[2] else "evaluation" for match in matches if match}


def _read_pairs(folder: Path) -> list[dict[str, Any]] | None:
    path = folder / "evaluation.parquet"
    if not path.exists():
        return None
    remedy = "Run `apo-trl evaluate` again, or remove the file."
    fields = [(name, pa.string()) for name in (*_TEXTS, "dtype")] + [(name, pa.float64()) for name in _NUMBERS]
    schema = pa.schema([*fields, ("trained_on", pa.bool_())])
    try:
        # Not read_table, which takes a folder that is named "seed=1" for a column.
        with pq.ParquetFile(path) as file:
            rows = file.read(columns=schema.names).select(schema.names).cast(schema).to_pylist()
    except (pa.ArrowException, KeyError, OSError, ValueError) as error:
        reason = shorten(str(error) or type(error).__name__, 150).rstrip(".")
        raise InputError(f"{path}: cannot be read ({reason}). {remedy}") from error
    regimes = {row["regime"] for row in rows}
    if not regimes or regimes - {*REGIMES, "other"}:
        raise InputError(f"{path}: no pairs or unknown regimes, got {[*regimes]!r:.60}. {remedy}")
    empty = dict.fromkeys(_TEXTS, "") | dict.fromkeys(_NUMBERS, math.nan)
    return [{name: empty.get(name) if value is None else value for name, value in row.items()} for row in rows]
