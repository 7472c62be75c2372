"""Tokens of a pair, as training computes them."""

import json
from collections.abc import Mapping
from typing import Any

from apo_trl.errors import InputError
from apo_trl.io.messages import one_line
from apo_trl.io.rows import common_prefix_length, normalise_row

__all__ = ["encode_pair"]


def encode_pair(tokenizer: Any, row: Mapping[str, Any]) -> tuple[list[int], list[int], list[int]]:
    """Compute the tokens of prompt, chosen and rejected as `DPOTrainer` of TRL 1.16 does.

    The answers end with what the chat template appends, or with the end token if the row holds strings. They start at
    the first difference between the prompt with its answers and the prompt alone.

    Raises:
        InputError: The chat template cannot render the row.
    """
    row = normalise_row(row)
    prompt, sides = row["prompt"], [row["chosen"], row["rejected"]]
    if isinstance(prompt, str):
        end = tokenizer.eos_token or ""
        start = list(tokenizer(text=prompt)["input_ids"])
        whole = [list(tokenizer(text=prompt + side.removesuffix(end) + end)["input_ids"]) for side in sides]
    else:
        tools = row.get("tools")
        options = {"tools": json.loads(tools) if isinstance(tools, str) else tools}
        options |= row.get("chat_template_kwargs") or {}

        def render(messages: list[dict[str, Any]], **more: Any) -> list[int]:
            return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **more)["input_ids"])

        try:
            start = render(prompt, add_generation_prompt=True, **options)
            whole = [render(prompt + side, **options) for side in sides]
        except Exception as error:  # a template may raise what it likes
            reason = one_line(error)
            raise InputError(f"The chat template cannot render this pair: {reason}. Correct the row.") from error
    at = min(common_prefix_length(start, ids) for ids in whole)
    return start[:at], whole[0][at:], whole[1][at:]
