"""Where the prompt of a row is: apart, in front of both answers, or in a column of another name."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from apo_trl.errors import InvalidRow
from apo_trl.io.columns import unknown_column
from apo_trl.io.messages import BEFORE_AN_ANSWER

__all__ = ["common_prefix_length", "split_prompt"]

_OTHER_NAMES = ("question", "instruction", "input", "query", "context")


def split_prompt(row: Mapping[str, Any], prompt: Any, chosen: Any, rejected: Any, vision: bool) -> tuple[Any, Any, Any]:
    """Return prompt, chosen and rejected of a row, with the prompt once.

    Args:
        row: The row, for the names of its columns.
        prompt: Messages, or a string, or None if the row has no `prompt`.
        chosen: A string, or messages, with or without the prompt in front.
        rejected: The same.
        vision: Whether the row has images.

    Raises:
        InvalidRow: There is no prompt, or an answer begins with another one.
    """
    if prompt is None:
        prompt, *sides = _find_prompt(row, chosen, rejected, vision)
    else:
        prompt, *sides = _cut_prompt(prompt, chosen, rejected)
    ends_in_question = not isinstance(chosen, str) and prompt[-1]["role"] in BEFORE_AN_ANSWER
    roles = [side[0]["role"] for side in sides if side] if ends_in_question else []
    if role := next((role for role in roles if role in BEFORE_AN_ANSWER), None):
        raise InvalidRow(f"has an answer that begins with a message of the role '{role}'. Move it to 'prompt'")
    return prompt, sides[0], sides[1]


def _find_prompt(row: Mapping[str, Any], chosen: Any, rejected: Any, vision: bool) -> tuple[Any, Any, Any]:
    """Return prompt, chosen and rejected of a row without `prompt`: what both answers begin with is the prompt."""
    if vision:
        raise InvalidRow("has no 'prompt', which a row with images needs. Add the column")
    length = common_prefix_length(chosen, rejected)
    if length == min(len(chosen), len(rejected)):
        length = max(0, length - 1)  # each side keeps something
    elif isinstance(chosen, str) and length and chosen[length - 1] == " ":
        length -= 1  # a space belongs to the word after it
    if isinstance(chosen, str) or not length:
        if name := _other_name(row):
            raise unknown_column(name, "prompt")
        if not length:
            least = "text to begin with" if isinstance(chosen, str) else "at least one message"
            raise InvalidRow(f"has no 'prompt', and without it the answers must share {least}. Add the column")
    return chosen[:length], chosen[length:], rejected[length:]


def _other_name(row: Mapping[str, Any]) -> str:
    """Return the column that may be the prompt: of a known name, or of a name like "promts"."""
    columns = {name: value for name, value in row.items() if name not in ("chosen", "rejected") and value}
    names = [name for name, value in columns.items() if isinstance(value, (str, list))]
    known = [name for name in names if name.casefold() in _OTHER_NAMES]
    return (known or difflib.get_close_matches("prompt", names, 1, 0.83) or [""])[0]


def _cut_prompt(prompt: Any, chosen: list[Any], rejected: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """Return prompt, chosen and rejected as messages, with the prompt cut from answers that are whole conversations.

    UltraFeedback and the CLAIR set of the APO paper have a string as prompt beside such conversations.
    """
    start = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    own, *keys = ([_key(message) for message in messages] for messages in (start, chosen, rejected))
    longest = max(0, min(len(chosen), len(rejected)) - 1)  # each side keeps an answer
    length = common_prefix_length(keys[0][:longest], keys[1][:longest])
    shared = keys[0][:length]
    if shared and shared[0][0] in BEFORE_AN_ANSWER:
        if isinstance(prompt, str) or own in (shared[: len(own)], shared[-len(own) :]):
            return chosen[:length], chosen[length:], rejected[length:]
        if shared == own[-length:]:  # the prompt without its first messages
            return start, chosen[length:], rejected[length:]
        if start[-1]["role"] != "user":
            return start + chosen[:length], chosen[length:], rejected[length:]
    cut = [len(own) if key[: len(own)] == own else 0 for key in keys]
    return start, chosen[cut[0] :], rejected[cut[1] :]


def _key(message: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what makes two messages the same: not an id, or a score."""
    return message["role"], message["content"], message.get("tool_calls")


def common_prefix_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return how many elements two sequences begin with in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (left, right) in pairs if left != right), min(len(first), len(second)))
