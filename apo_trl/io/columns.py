"""What only some rows have: tools, settings of the template, images, `chosen_wins`, and more fields in messages."""

import json
import math
from collections.abc import Mapping
from typing import Any

from apo_trl.errors import InvalidRow
from apo_trl.io.messages import replace_surrogates

__all__ = ["as_json", "normalise_columns"]


def normalise_columns(row: dict[str, Any], needs_wins: bool, vision: bool) -> dict[str, Any]:
    """Return a row with its optional columns in their normal form, as far as it has them; see `normalise_row`."""
    if needs_wins:
        _check_wins(row.get("chosen_wins"))
    row = dict(row)
    for column, kind, empty in (("tools", list, None), ("chat_template_kwargs", dict, {})):
        if column in row:
            row[column] = empty if row[column] is None else _parse(row[column], column, kind)
    if vision:
        images = row.pop("image", row.get("images"))
        listed = images if isinstance(images, (list, tuple)) else [images]
        row["images"] = [image for image in listed if image is not None]
    return row


def as_json(value: Any) -> Any:
    """Return a value as JSON can hold it, its objects without nulls."""
    if isinstance(value, Mapping):
        parts = {replace_surrogates(str(key)): as_json(part) for key, part in value.items()}
        return {key: part for key, part in parts.items() if part is not None}
    if isinstance(value, (list, tuple)):
        return [as_json(part) for part in value]
    if isinstance(value, str):
        return replace_surrogates(value)
    if value is None or isinstance(value, (bool, float)) or (isinstance(value, int) and abs(value) < 2**63):
        return value if not isinstance(value, float) or math.isfinite(value) else None
    return str(value)  # a date of Parquet, for example


def _parse(value: Any, column: str, kind: type) -> Any:
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, kind):
        name = "a list" if kind is list else "an object"
        raise InvalidRow(f"has no valid '{column}'. It must be {name}, or {name} as JSON")
    return as_json(value)


def _check_wins(wins: Any) -> None:
    rule = "'apo_blend' needs the probability, from 0 to 1, that chosen beats the policy's own answer"
    if wins is None:
        raise InvalidRow(f"has no 'chosen_wins'. {rule}")
    if isinstance(wins, bool) or not isinstance(wins, (int, float)):
        raise InvalidRow(f"has {wins!r} as 'chosen_wins'. {rule}")
    if math.isnan(wins) or not 0 <= wins <= 1:
        raise InvalidRow(f"has chosen_wins={wins}. {rule}")
