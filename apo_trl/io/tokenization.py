"""Texts as tokens: words of any script, and pairs as the training's tokenizer sees them."""

import json
from collections.abc import Mapping
from typing import Any

from apo_trl.errors import InputError
from apo_trl.io.rows import common_prefix_length, normalise_row

__all__ = ["encode_pair", "load_tokenizer"]


def load_tokenizer(name_or_path: str) -> Any:
    """Load the tokenizer of the model that will be trained; transformers may import torch for it."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError, KeyError, ImportError) as error:
        why = " ".join(str(error).split())[:300]
        raise InputError(f"The tokenizer {name_or_path} cannot be loaded: {why}") from error


def encode_pair(tokenizer: Any, row: Mapping[str, Any]) -> tuple[list[int], list[int], list[int]]:
    """Give the tokens of prompt, chosen and rejected as `DPOTrainer` of TRL 1.16 makes them of a row.

    The answers hold what the chat template puts after them, or the end token where the row is text. They start where
    the prompt with its answers first differs from the prompt alone. Raises InputError where the template fails.
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
            raise InputError(f"The chat template cannot render this pair: {error or type(error).__name__}") from error
    at = min(common_prefix_length(start, ids) for ids in whole)
    return start[:at], whole[0][at:], whole[1][at:]
