"""The rules of a preference row: which rows are invalid, which teach nothing, and their one normal form.

A row has `chosen` and `rejected`, and mostly `prompt`, each a string or a list of messages. An invalid row is an
error; a degenerate pair is valid, teaches nothing, and is dropped and counted. No torch here.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["common_prefix_length", "degenerate_reason", "normalise_row", "split_conversation", "validate_row"]


def validate_row(row: Mapping[str, Any], *, needs_wins: bool = False) -> str | None:
    """Return why a row is invalid, to follow "row 3 of the train dataset", or None for a valid row."""
    sides = [side for side in ("prompt", "chosen", "rejected") if side != "prompt" or "prompt" in row]
    for side in sides:
        value = row.get(side)
        if value is None:
            return f"has no '{side}'. Fill it or remove the row"
        if isinstance(value, str):
            continue
        if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
            return f"has {_type_name(value)} as '{side}'. It must be a string or a list of messages"
        if any(not message.get("role") for message in value):
            return f"has a message without 'role' in '{side}'. Every message needs 'role' and 'content'"
        if not value and (side == "prompt" or "prompt" not in row):
            return f"has an empty list as '{side}'. It needs at least one message"
    strings = {side for side in sides if isinstance(row[side], str)}
    if strings not in (set(), {"prompt"}, set(sides)):
        names = " and ".join(map(repr, sorted(strings)))
        return f"has a string as {names} beside a list of messages. Use one of the two"
    return _invalid_wins(row) if needs_wins else None


def _invalid_wins(row: Mapping[str, Any]) -> str | None:
    wins = row.get("chosen_wins")
    rule = "'apo_blend' needs the probability, from 0 to 1, that chosen beats the policy's own answer"
    if wins is None:
        return f"has no 'chosen_wins'. {rule}"
    if isinstance(wins, bool) or not isinstance(wins, (int, float)):
        return f"has {wins!r} as 'chosen_wins'. {rule}"
    return None if not math.isnan(wins) and 0 <= wins <= 1 else f"has chosen_wins={wins}. {rule}"


def _type_name(value: Any) -> str:
    return f"a list of {type(value[0]).__name__}" if isinstance(value, list) and value else type(value).__name__


def normalise_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with a `prompt` of the kind of its answers: its own, or the prefix that both answers share."""
    chosen, rejected = row["chosen"], row["rejected"]
    if "prompt" in row:
        mixed = isinstance(row["prompt"], str) and not isinstance(chosen, str)
        return {**row, **(split_conversation(row) if mixed else {})}
    length = common_prefix_length(chosen, rejected)
    if length == min(len(chosen), len(rejected)):
        length = max(0, length - 1)  # each side keeps something
    elif length and chosen[length - 1] == " ":
        length -= 1  # a space belongs to the word after it
    return {**row, "prompt": chosen[:length], "chosen": chosen[length:], "rejected": rejected[length:]}


def split_conversation(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return `prompt`, `chosen` and `rejected` as messages for a row with a string as prompt beside two message lists.

    UltraFeedback and the CLAIR set of the APO paper have this form. If both lists begin with the same messages, these
    are the prompt; else the string becomes the user's message.
    """
    chosen, rejected = row["chosen"], row["rejected"]
    longest = max(0, min(len(chosen), len(rejected)) - 1)  # each side keeps an answer
    shared = common_prefix_length(chosen[:longest], rejected[:longest])
    prompt = chosen[:shared] or [{"role": "user", "content": row["prompt"]}]
    return {"prompt": prompt, "chosen": chosen[shared:], "rejected": rejected[shared:]}


def common_prefix_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return how many elements two sequences begin with in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (left, right) in pairs if left != right), min(len(first), len(second)))


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
