"""Training runs as their output folders tell them: the log, the settings, the evaluated pairs."""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apo_trl.errors import InputError
from apo_trl.evaluation.report.axes import REGIMES

__all__ = ["Log", "Run", "held_out", "names", "read_log", "read_run"]

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


_TEXTS = ("id", "regime", "prompt", "chosen", "rejected")
_NUMBERS = (
    *("chosen_logratio", "rejected_logratio", "chosen_logratio_per_token", "rejected_logratio_per_token"),
    *("chosen_logp", "rejected_logp", "ref_chosen_logp", "ref_rejected_logp", "chosen_tokens", "rejected_tokens"),
)


def names(runs: Sequence[str]) -> list[str]:
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


def read_run(folder: Path, name: str) -> Run:
    """Read what lies in the folder of a run."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give the output folder of a training run.")
    source, state = _read_state(folder)
    log = read_log(state["log_history"])
    return Run(name, folder, source, state, log, held_out(log), _read_record(folder), _read_pairs(folder))


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
        raise InputError(
            f"{damaged} is damaged and {folder} has no other; give the folder of a run whose log is whole."
        )
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


def read_log(history: Iterable[Any]) -> Log:
    """Sort the numbers of a log by metric and step; of a step that was logged twice, the last counts."""
    log: Log = {}
    for entry in history:
        step = entry.get("step") if isinstance(entry, Mapping) else None
        if type(step) is not int or not 0 <= step < 10**15:
            continue
        for key, value in entry.items():
            if key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                endless = abs(value) > 10**300  # an int may be larger than any float
                log.setdefault(key, {})[step] = math.copysign(math.inf, 1 if value > 0 else -1) if endless else value
    return {key: dict(sorted(points.items())) for key, points in log.items()}


def held_out(log: Log) -> dict[str, str]:
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
        first = (str(error).splitlines() or [type(error).__name__])[0][:150].rstrip(".")
        raise InputError(f"{path} cannot be read ({first}); {remedy}.") from error
    if not rows:
        raise InputError(f"{path} has no pairs; {remedy}.")
    for row in rows:
        if row["regime"] not in REGIMES:
            raise InputError(f"{path} has {row['regime']!r:.60} as a regime, which is none; {remedy}.")
        row |= {name: math.nan for name in _NUMBERS if row[name] is None}
        row |= {name: "" for name in _TEXTS if row[name] is None}
    return rows  # type: ignore[no-any-return]
