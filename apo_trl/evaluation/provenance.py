"""Where a trained model comes from, by its run.json: settings, precision, and the pairs that it was trained on."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from apo_trl.errors import InputError
from apo_trl.io.completion import completion_text
from apo_trl.io.readers import is_local, load_dataset_splits

__all__ = ["described", "read_json", "read_record", "trained_in", "trained_on"]


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, or None if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def read_record(folder: Path) -> dict[str, Any] | None:
    """Read the run.json of a run or of one of its checkpoints; None if there is none."""
    paths = [folder / "run.json", *([folder.parent / "run.json"] if folder.name.startswith("checkpoint-") else [])]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return None
    record = read_json(path)
    if isinstance(record, dict) and all(isinstance(record.get(part), dict) for part in ("settings", "versions")):
        return record
    raise InputError(f"{path}: damaged. Remove it to go on without the settings of the run.")


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
    if Path(name).exists() and record.get("date"):
        begun = datetime.fromisoformat(record["date"]).timestamp() + 1  # its fraction is not recorded
        if any(path.stat().st_mtime > begun for path in (Path(name), *Path(name).rglob("*")) if path.is_file()):
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
