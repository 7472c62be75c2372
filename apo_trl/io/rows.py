"""Read a preference row: its normal form, what makes it invalid, and which pairs are degenerate.

Training, statistics, evaluation and the data side all read a row as `normalise_row` returns it, so they see the same
tokens. A degenerate pair is valid, teaches nothing, and is dropped and counted. No torch here.
"""

from collections.abc import Mapping
from typing import Any

from apo_trl.errors import InvalidRow
from apo_trl.io.messages import BEFORE_AN_ANSWER, content_text, replace_surrogates

__all__ = ["OTHER_FORMATS", "ROW_COLUMNS", "degenerate_reason", "normalise_messages", "normalise_row", "row_form"]

ROW_COLUMNS = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")
"""The columns that become tokens."""

OTHER_FORMATS = ("messages", "completion")
"""Columns of other kinds of data, by which TRL may decide, at random, whether rows are conversations."""

_ROLES = (*BEFORE_AN_ANSWER, "assistant", "tool")


def row_form(row: Mapping[str, Any]) -> str:
    """Return the form of a row's answers, which all rows of a dataset share: text, messages, or messages as JSON."""
    chosen = row.get("chosen")
    if isinstance(chosen, str):
        return "text" if isinstance(_parse(chosen), str) else "messages as JSON"
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
    # Parquet has a null where JSONL has no prompt.
    sides = [side for side in ("prompt", "chosen", "rejected") if side != "prompt" or row.get("prompt") is not None]
    values = {side: _side(row, side, vision) for side in sides}
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
    # TRL reads the first message of an answer, so an empty list becomes an empty message.
    empty: Any = "" if isinstance(prompt, str) else [{"role": "assistant", "content": ""}]
    normal = {**row, "prompt": prompt, "chosen": chosen or empty, "rejected": rejected or empty}
    if needs_wins or vision or "tools" in row or "chat_template_kwargs" in row:
        from apo_trl.io.columns import normalise_columns

        normal = normalise_columns(normal, needs_wins, vision)
    return normal


def _side(row: Mapping[str, Any], side: str, vision: bool) -> Any:
    value = row.get(side)
    if value is None:
        from apo_trl.io.columns import missing_column

        raise missing_column(side, row)
    if isinstance(value, str) and isinstance(value := _parse(value), str):
        return replace_surrogates(value)
    messages = normalise_messages(value, side, vision)
    if not messages and side == "prompt":
        raise InvalidRow(f"has an empty list as '{side}'. It needs at least one message")
    return messages


def _parse(text: str) -> Any:
    if not text.startswith("["):
        return text
    from apo_trl.io.columns import parse_messages

    return parse_messages(text)


def normalise_messages(value: Any, field: str, vision: bool = False) -> list[dict[str, Any]]:
    """Return messages in their normal form; raise InvalidRow, which names the row's `field`."""
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        from apo_trl.io.columns import message_list

        value = message_list(value, field)
    messages = []
    for message in value:
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            from apo_trl.io.columns import check_role

            check_role(role, field)
        parts = content if isinstance(content, list) and all(isinstance(part, Mapping) for part in content) else []
        if vision and parts:
            content = [{key: value for key, value in part.items() if value is not None} for part in parts]
        elif content is not None:
            content = content_text(given := content)
            if content is None:
                from apo_trl.io.columns import content_error

                raise content_error(given, parts, field)
        normal = {"role": replace_surrogates(role), "content": content}
        if rest := {key: part for key, part in message.items() if key not in normal}:
            from apo_trl.io.columns import more_of_message

            normal |= more_of_message(rest)
        messages.append(normal)
    return messages


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
