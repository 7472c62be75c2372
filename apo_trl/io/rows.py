"""The rules of a preference row.

A row is a pair: `chosen` and `rejected`, and mostly a `prompt`, each a text or a list of messages. A row that breaks a
rule stops everything, with its number; a row that keeps them all and still can teach nothing is named by
`degenerate_reason`, to be left out and counted. No torch here, so that whoever only reads data can import it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["degenerate_reason", "split_conversation", "validate_row"]


def validate_row(row: Mapping[str, Any], *, needs_wins: bool = False) -> str | None:
    """Say what makes a row unusable, in words that follow "row 3 of the train dataset", or None."""
    sides = [side for side in ("prompt", "chosen", "rejected") if side != "prompt" or "prompt" in row]
    for side in sides:
        value = row.get(side)
        if value is None:
            return f"has no '{side}'; fill it or remove the row"
        if isinstance(value, str):
            continue
        if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
            return f"has {_type(value)} as '{side}'; it must be a text or a list of messages"
        if any(not message.get("role") for message in value):
            return f"has a message without 'role' in '{side}'; every message needs 'role' and 'content'"
        if not value and (side == "prompt" or "prompt" not in row):
            return f"has an empty list as '{side}'; it needs at least one message"
    texts = {side for side in sides if isinstance(row[side], str)}
    if texts not in (set(), {"prompt"}, set(sides)):
        return f"has text as {' and '.join(map(repr, sorted(texts)))} beside a list of messages; use one of the two"
    return _wins_fault(row) if needs_wins else None


def split_conversation(row: Mapping[str, Any]) -> dict[str, Any]:
    """Give `prompt`, `chosen` and `rejected` as messages for a row with a text beside two lists of messages.

    UltraFeedback and the CLAIR set of the APO paper come in this form. Where both lists begin with the same messages,
    they hold the whole conversation and what they share is the prompt; else the text becomes the user's message.
    """
    chosen, rejected = row["chosen"], row["rejected"]
    longest = max(0, min(len(chosen), len(rejected)) - 1)  # each side keeps an answer
    shared = next((at for at in range(longest) if chosen[at] != rejected[at]), longest)
    prompt = chosen[:shared] or [{"role": "user", "content": row["prompt"]}]
    return {"prompt": prompt, "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _wins_fault(row: Mapping[str, Any]) -> str | None:
    wins = row.get("chosen_wins")
    rule = "'apo_blend' needs the probability, from 0 to 1, that chosen beats the policy's own answer"
    if wins is None:
        return f"has no 'chosen_wins'; {rule}"
    if isinstance(wins, bool) or not isinstance(wins, (int, float)):
        return f"has {wins!r} as 'chosen_wins'; {rule}"
    if math.isnan(wins) or not 0 <= wins <= 1:
        return f"has chosen_wins={wins}; {rule}"
    return None


def degenerate_reason(
    row: Mapping[str, Any], *, max_length: int | None = None, keep_end: bool = False, eos_token: str = ""
) -> str | None:
    """Name the reason why a pair can teach nothing, or None.

    Looks at the texts and, where the row has `prompt_ids`, `chosen_ids` and `rejected_ids`, at the tokens that are left
    after truncation to `max_length`, as TRL's collator cuts them (the start is kept, or the end with `keep_end`).
    """
    chosen, rejected = row["chosen"], row["rejected"]
    if _blank(chosen, eos_token) or _blank(rejected, eos_token):
        return "a completion is empty"
    if chosen == rejected:
        return "chosen equals rejected"
    if "prompt_ids" not in row:
        return None
    prompt, sides = row["prompt_ids"], (row["chosen_ids"], row["rejected_ids"])
    if not all(sides):
        return "a completion is empty"
    if max_length is None:
        kept = sides
    elif keep_end:
        kept = tuple((prompt + side)[-max_length:] for side in sides)
    else:
        kept = tuple(side[: max(0, max_length - len(prompt))] for side in sides)
    if sides[0] == sides[1]:
        return "chosen equals rejected as tokens"
    return f"chosen equals rejected after truncation to max_length={max_length}" if kept[0] == kept[1] else None


def _blank(completion: str | list[dict[str, Any]], eos_token: str) -> bool:
    if isinstance(completion, str):
        return not completion.removesuffix(eos_token).strip()
    return all(
        not (content.strip() if isinstance(content := message.get("content"), str) else content)
        and not message.get("tool_calls")
        for message in completion
    )


def _type(value: Any) -> str:
    return f"a list of {type(value[0]).__name__}" if isinstance(value, list) and value else f"{type(value).__name__}"


def common_prefix_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Count how many elements two sequences begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(one), len(other)))


def normalise_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Give a preference row with a `prompt` of the kind of its answers: its own, or what both answers begin with."""
    chosen, rejected = row["chosen"], row["rejected"]
    if "prompt" in row:
        mixed = isinstance(row["prompt"], str) and not isinstance(chosen, str)
        return {**row, **(split_conversation(row) if mixed else {})}
    at = common_prefix_length(chosen, rejected)
    if at == min(len(chosen), len(rejected)):
        at = max(0, at - 1)  # each side keeps something
    elif at and chosen[at - 1] == " ":
        at -= 1  # a space belongs to the word after it
    return {**row, "prompt": chosen[:at], "chosen": chosen[at:], "rejected": rejected[at:]}
