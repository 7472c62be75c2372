"""What only some rows have: messages as JSON, other roles, tools, images, `chosen_wins`, and more in messages."""

import difflib
import json
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

from apo_trl.errors import InputError, InvalidRow
from apo_trl.io.messages import replace_surrogates

__all__ = ["as_json", "check_role", "content_error", "message_list", "missing_column", "more_of_message"]
__all__ += ["normalise_columns", "parse_messages", "transform_error", "unknown_column"]

_SINGLE_ANSWERS = {"messages", "conversations", "completion", "answer", "response", "output", "text"}

_ROLES_ELSEWHERE = {role: role for role in ("system", "developer", "user", "assistant", "tool")} | {
    "human": "user", "gpt": "assistant", "bot": "assistant", "ai": "assistant",
}  # fmt: skip


def parse_messages(text: str) -> Any:
    """Return the messages that a text holds as JSON, or the text. Other lists of objects with a `role` are text."""
    if text[:1] != "[" or '"role"' not in text:
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    messages = [each for each in value if isinstance(each, dict) and "role" in each]
    said = [each for each in messages if "content" in each or "tool_calls" in each]
    return value if value and len(said) == len(value) else text


def missing_column(column: str, row: Iterable[str]) -> InvalidRow:
    """Return the error for a row or a dataset, given by its columns, without one of them."""
    row = row if isinstance(row, Mapping) else dict.fromkeys(row, "")
    if column in row:
        return InvalidRow(f"has no '{column}'. Fill it or remove the row")
    others = [name for name in row if name not in ("prompt", "chosen", "rejected")]
    if match := difflib.get_close_matches(column, others, 1, 0.75):
        return unknown_column(match[0], column)
    if {"prompt", "completion", "label"} <= row.keys():
        remedy = "Single answers with labels: use the recipe qwen3-0.6b/kto_apo_zero_unpaired, or build pairs of them"
    elif column != "chosen_wins" and not {"chosen", "rejected"} & row.keys() and _SINGLE_ANSWERS & row.keys():
        remedy = "Single answers: build pairs of them with `apo-trl pairs build`"
    else:
        remedy = "Add it, or rename one with `dataset.rename_column`"
    why = ", required by the loss 'apo_blend'" if column == "chosen_wins" else ""
    return InvalidRow(f"has no column '{column}'{why}; its columns are {list(row)}. {remedy}")


def unknown_column(name: str, meant: str) -> InvalidRow:
    """Return the error for a column of another name, such as "promt" or "question"."""
    return InvalidRow(f"has the unknown column '{name}'. Did you mean '{meant}'? Rename it")


def transform_error(name: str) -> InputError:
    """Return the error for a dataset with a transform, whose columns are in no row that is stored."""
    return InputError(
        f"The {name} dataset has a transform, which rows get only when they are read. Apply it with `dataset.map`; "
        "images are loaded when they are read by `dataset.cast_column('images', List(Image()))`."
    )


def message_list(value: Any, field: str) -> list[Any]:
    """Return a tuple of messages, or NumPy's array of them, as a list; raise InvalidRow for anything else."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, (list, tuple)) and all(isinstance(message, Mapping) for message in value):
        return list(value)
    kind = f"a list of {type(value[0]).__name__}" if isinstance(value, list) else type(value).__name__
    raise InvalidRow(f"has {kind} as '{field}'. It must be a string or a list of messages")


def check_role(role: Any, field: str) -> None:
    """Raise InvalidRow if a message has no role, or one that chat templates call by another name."""
    if not role or not isinstance(role, str):
        raise InvalidRow(f"has a message without 'role' in '{field}'. Every message needs 'role' and 'content'")
    if name := _ROLES_ELSEWHERE.get(role.casefold()):
        raise InvalidRow(f"has the role '{role}' in '{field}'. Rename it to '{name}'")


def content_error(content: Any, parts: list[Any], field: str) -> InvalidRow:
    """Return the error for a content that is neither text nor parts of text."""
    other = next((str(part.get("type")) for part in parts if part.get("type") != "text"), None)
    kind = type(content).__name__ if other is None else f"a part of type '{other}'"
    return InvalidRow(f"has {kind} as 'content' in '{field}'. Use text; without the column `images` only text is read")


def normalise_columns(row: dict[str, Any], needs_wins: bool, vision: bool) -> dict[str, Any]:
    """Return a row with its optional columns in their normal form, as far as it has them; see `normalise_row`."""
    if needs_wins:
        _check_wins(row.get("chosen_wins"))
    row = dict(row)
    for column, kind, empty in (("tools", list, None), ("chat_template_kwargs", dict, {})):
        if column in row:
            row[column] = empty if row[column] in (None, "", "null") else _parse(row[column], column, kind)
    if vision:
        images = row.pop("image", row.get("images"))
        listed = images if isinstance(images, (list, tuple)) else [images]
        row["images"] = [image for image in listed if image is not None]
    return row


def more_of_message(values: Mapping[str, Any]) -> Any:
    """Return what a message has beside role and content; raise InvalidRow for tool calls that are no list."""
    more = as_json(values)
    if isinstance(calls := more.get("tool_calls"), str):  # as `pairs build` writes those of several types
        more["tool_calls"] = _parse(calls, "tool_calls", list)
    return more


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
    if kind is list:  # of tools, each an object or its JSON
        tools: Any = value
        return [_parse(tool, column, dict) for tool in tools]
    return as_json(value)


def _check_wins(wins: Any) -> None:
    rule = "'apo_blend' needs the probability, from 0 to 1, that chosen beats the policy's own answer"
    if wins is None:
        raise InvalidRow(f"has no 'chosen_wins'. {rule}")
    if isinstance(wins, bool) or not isinstance(wins, numbers.Real):
        raise InvalidRow(f"has {wins!r} as 'chosen_wins'. {rule}")
    if not 0 <= float(wins) <= 1:  # also NaN
        raise InvalidRow(f"has chosen_wins={wins}. {rule}")
