"""Where a trained model comes from, by its run.json: settings, precision, and the pairs that it was trained on."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from apo_trl.errors import InputError
from apo_trl.io.completion import completion_text
from apo_trl.io.files import read_json
from apo_trl.io.readers import is_local, load_dataset_splits

__all__ = ["described", "read_record", "trained_in", "trained_on"]


def read_record(folder: Path) -> dict[str, Any] | None:
    """Read the run.json of a run or of one of its checkpoints, or return None without one."""
    checkpoint = folder / "trainer_state.json" if folder.name.startswith("checkpoint-") else None
    path = (folder.parent if checkpoint else folder) / "run.json"
    if not path.exists():
        return None
    record = read_json(path)
    if isinstance(record, dict) and all(isinstance(record.get(part), dict) for part in ("settings", "versions")):
        older = checkpoint and checkpoint.exists() and checkpoint.stat().st_mtime < _begun(record)
        return None if older else record  # of an earlier run in the same folder
    raise InputError(f"{path}: damaged. Remove it to go on without the settings of the run.")


def _begun(record: Mapping[str, Any]) -> float:
    """Return when a run began, in seconds, or 0 if its record does not say."""
    return datetime.fromisoformat(record["date"]).timestamp() if record.get("date") else 0.0


def trained_in(record: Mapping[str, Any] | None) -> str:
    """Return the precision in which a run trained, for the end of a sentence."""
    known = record["settings"].get("precision") if record else None
    return f"in {known}" if known else "in a precision that is not recorded"


def _texts(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(completion_text(row.get(side) or "") for side in ("prompt", "chosen", "rejected"))


def trained_on(record: Mapping[str, Any] | None, dataset: str, pairs: Sequence[Mapping[str, Any]]) -> list[bool | None]:
    """Return of each pair whether it is in the data that a run was trained on, or None if that data is not at hand.

    Reads the dataset of the record if it is the evaluated one, or local and not changed since training began: another
    is not downloaded for this.
    """
    from apo_trl.datasets.preprocessing import normalise_datasets

    name = record.get("dataset") if record else None
    unknown: list[bool | None] = [None] * len(pairs)
    if record is None or not isinstance(name, str) or not (name == dataset or is_local(name)):
        return unknown
    if Path(name).exists():
        stats = [path.stat() for path in (Path(name), *Path(name).rglob("*")) if path.is_file()]
        # The record has no fractions of a second. A file that is moved there keeps the time of its content.
        changed = max((max(stat.st_mtime, stat.st_ctime) for stat in stats), default=0.0)
        if not Path(name).is_absolute() or changed > _begun(record) + 1:
            return unknown
    settings = record["settings"]
    try:
        splits = load_dataset_splits(name, config=settings.get("dataset_config"))
        rows = normalise_datasets(splits[settings.get("dataset_train_split", "train")], "train")
    except (InputError, KeyError):  # moved or changed since
        return unknown
    known = {_texts(row) for row in rows}
    return [_texts(pair) in known for pair in pairs]


def described(trained: Sequence[bool | None]) -> str:
    """Return what to call evaluated pairs, by `trained_on`: "held-out" only if none of them was trained on."""
    count, seen = f"{len(trained):,}", sum(map(bool, trained))
    if None in trained:
        return f"{count} evaluated pairs"
    if seen:
        return f"{count} pairs that were trained on" if seen == len(trained) else f"{count} pairs ({seen:,} trained on)"
    return f"{count} held-out pairs"
