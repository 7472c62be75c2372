"""The one reading of a preference row: its normal form, what makes it invalid, and which pairs teach nothing.

Training, statistics, evaluation and the data side all read a row as `normalise_row` returns it, so they see the same
tokens. A degenerate pair is valid, teaches nothing, and is dropped and counted. No torch here.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from apo_trl.errors import InvalidRow
from apo_trl.io.messages import BEFORE_AN_ANSWER, common_prefix_length, content_text, replace_surrogates

__all__ = ["common_prefix_length", "degenerate_reason", "normalise_messages", "normalise_row"]
__all__ += ["parse_messages", "row_form"]


def row_form(row: Mapping[str, Any]) -> str:
    """Return the form of a row's answers, which all rows of a dataset share: text, messages, or messages as JSON."""
    chosen = row.get("chosen")
    if isinstance(chosen, str):
        return "text" if parse_messages(chosen) is chosen else "messages as JSON"
    return "messages"


def normalise_row(
    row: Mapping[str, Any], *, form: str | None = None, needs_wins: bool = False, vision: bool | None = None
) -> dict[str, Any]:
    """Return a row in its normal form.

    `prompt` is a column of its own, of the kind of the answers, and not repeated in them. The content of a message is
    text, or parts in a row with images. Messages and `tools` as JSON are parsed, and hold no null but an absent
    `content`: Parquet and `Dataset.from_list` give every object the keys of all rows. `images` is a list. A row in its
    normal form stays as it is.

    Args:
        row: `chosen` and `rejected`, and mostly `prompt`: each a string or a list of messages.
        form: That of the dataset's first row, by `row_form`, which the row must have too.
        needs_wins: Whether `chosen_wins` is required.
        vision: Whether the row has images, by default whether it has the column `images` or `image`.

    Raises:
        InvalidRow: The row is invalid.
    """
    if vision is None:
        vision = "images" in row or "image" in row
    sides = [side for side in ("prompt", "chosen", "rejected") if side != "prompt" or "prompt" in row]
    values = {side: _side(row.get(side), side, vision) for side in sides}
    texts = {side for side, value in values.items() if isinstance(value, str)}
    if texts not in (set(), {"prompt"}, set(sides)):
        names = " and ".join(map(repr, sorted(texts)))
        raise InvalidRow(f"has a string as {names} beside a list of messages. Use one of the two")
    if form and (own := row_form(row)) != form:
        raise InvalidRow(f"has {own} as 'chosen', the first row {form}. Use one form in all rows")
    prompt, chosen, rejected = (values.get(side) for side in ("prompt", "chosen", "rejected"))
    starts = {side[0]["role"] for side in (chosen, rejected) if side and not isinstance(side, str)}
    if prompt is None or len(texts) == 1 or not starts.isdisjoint(BEFORE_AN_ANSWER):
        from apo_trl.io.prompt import split_prompt

        prompt, chosen, rejected = split_prompt(row, prompt, chosen, rejected, vision)
    if needs_wins:
        _check_wins(row.get("chosen_wins"))
    normal = {**row, "prompt": prompt, "chosen": chosen, "rejected": rejected}
    for column, kind, empty in (("tools", list, None), ("chat_template_kwargs", dict, {})):
        if column in row:
            normal[column] = empty if row[column] is None else _parse(row[column], column, kind)
    if vision:
        images = normal.pop("image", row.get("images"))
        listed = images if isinstance(images, (list, tuple)) else [images]
        normal["images"] = [image for image in listed if image is not None]
    return normal


def _side(value: Any, side: str, vision: bool) -> Any:
    if value is None:
        raise InvalidRow(f"has no '{side}'. Fill it or remove the row")
    if isinstance(value, str):
        value = parse_messages(value)
    if isinstance(value, str):
        return replace_surrogates(value)
    messages = normalise_messages(value, side, vision)
    if not messages and side == "prompt":
        raise InvalidRow(f"has an empty list as '{side}'. It needs at least one message")
    return messages


def parse_messages(text: str) -> Any:
    """Return the messages that a text holds as JSON, or the text."""
    if text[:1] == "[" and '"role"' in text:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return text
        if isinstance(value, list) and value and all(isinstance(each, dict) and "role" in each for each in value):
            return value
    return text


def normalise_messages(value: Any, field: str, vision: bool = False) -> list[dict[str, Any]]:
    """Return messages in their normal form; raise InvalidRow, which names the row's `field`."""
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        kind = f"a list of {type(value[0]).__name__}" if isinstance(value, list) else type(value).__name__
        raise InvalidRow(f"has {kind} as '{field}'. It must be a string or a list of messages")
    messages = []
    for message in value:
        role, content = message.get("role"), message.get("content")
        if not role or not isinstance(role, str):
            raise InvalidRow(f"has a message without 'role' in '{field}'. Every message needs 'role' and 'content'")
        parts = content if isinstance(content, list) and all(isinstance(part, Mapping) for part in content) else []
        if vision and parts:
            content = [_without_nulls(part) for part in parts]
        elif content is not None:
            content = content_text(given := content)
            if content is None:
                other = next((str(part.get("type")) for part in parts if part.get("type") != "text"), None)
                kind = type(given).__name__ if other is None else f"a part of type '{other}'"
                raise InvalidRow(
                    f"has {kind} as 'content' in '{field}'. Use text; without the column `images` only text is read"
                )
        rest = {key: part for key, part in message.items() if key not in ("role", "content")}
        messages.append({"role": replace_surrogates(role), "content": content, **_json(rest)})
    return messages


def _json(value: Any) -> Any:
    """Return a value as JSON can hold it, its objects without nulls."""
    if isinstance(value, Mapping):
        return _without_nulls({replace_surrogates(str(key)): _json(part) for key, part in value.items()})
    if isinstance(value, (list, tuple)):
        return [_json(part) for part in value]
    if isinstance(value, str):
        return replace_surrogates(value)
    if value is None or isinstance(value, (bool, float)) or (isinstance(value, int) and abs(value) < 2**63):
        return value if not isinstance(value, float) or math.isfinite(value) else None
    return str(value)  # a date of Parquet, for example


def _without_nulls(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: part for key, part in value.items() if part is not None}


def _parse(value: Any, column: str, kind: type) -> Any:
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, kind):
        name = "a list" if kind is list else "an object"
        raise InvalidRow(f"has no valid '{column}'. It must be {name}, or {name} as JSON")
    return _json(value)


def _check_wins(wins: Any) -> None:
    rule = "'apo_blend' needs the probability, from 0 to 1, that chosen beats the policy's own answer"
    if wins is None:
        raise InvalidRow(f"has no 'chosen_wins'. {rule}")
    if isinstance(wins, bool) or not isinstance(wins, (int, float)):
        raise InvalidRow(f"has {wins!r} as 'chosen_wins'. {rule}")
    if math.isnan(wins) or not 0 <= wins <= 1:
        raise InvalidRow(f"has chosen_wins={wins}. {rule}")


def degenerate_reason(
    row: Mapping[str, Any], *, max_length: int | None = None, keep_end: bool = False, eos_token: str = ""
) -> str | None:
    """Return why a pair teaches nothing, or None.

    Compares the answers and, if the row has `prompt_ids`, `chosen_ids` and `rejected_ids`, the tokens that are left
    after truncation to `max_length` by TRL's collator, which keeps the start, or the end with `keep_end`.
    """
    chosen, rejected = row["chosen"], row["rejected"]
    if _is_blank(chosen, eos_token) or _is_blank(rejected, eos_token):
        return "a completion is empty"
    if chosen == rejected:
        return "chosen equals rejected"
    if "prompt_ids" not in row:
        return None
    prompt, sides = row["prompt_ids"], (row["chosen_ids"], row["rejected_ids"])
    if not all(sides):
        return "a completion is empty"
    if sides[0] == sides[1]:
        return "chosen equals rejected as tokens"
    if max_length is None:
        return None
    if keep_end:
        kept = [(prompt + side)[-max_length:] for side in sides]
    else:
        kept = [side[: max(0, max_length - len(prompt))] for side in sides]
    return f"chosen equals rejected after truncation to max_length={max_length}" if kept[0] == kept[1] else None


def _is_blank(completion: str | list[dict[str, Any]], eos_token: str) -> bool:
    if isinstance(completion, str):
        return not completion.removesuffix(eos_token).strip()
    return all(
        not (content.strip() if isinstance(content := message.get("content"), str) else content)
        and not message.get("tool_calls")
        for message in completion
    )
