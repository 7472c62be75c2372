"""Tokens of a pair, as training computes them."""

from collections.abc import Mapping
from typing import Any

from apo_trl.errors import InputError
from apo_trl.io.error_text import one_line
from apo_trl.io.prompt import common_prefix_length
from apo_trl.io.rows import normalise_row

__all__ = ["encode_pair", "first_failure"]


def encode_pair(tokenizer: Any, row: Mapping[str, Any]) -> tuple[list[int], list[int], list[int]]:
    """Compute the tokens of prompt, chosen and rejected as `DPOTrainer` of TRL 1.16 does, by its function.

    The answers end with what the chat template appends, or with the end token if the row holds strings. They start at
    the first difference between the prompt with its answers and the prompt alone.

    Args:
        tokenizer: A tokenizer, or the processor of a vision model for a row without images.
        row: A row in any form that `normalise_row` reads.

    Raises:
        InputError: The row is invalid, or the chat template cannot render it.
    """
    from trl.data_utils import _tokenize

    row = normalise_row(row)
    prompt, sides = row["prompt"], [row["chosen"], row["rejected"]]
    options: dict[str, Any] = {}
    start_options: dict[str, Any] = {}
    if isinstance(prompt, str):
        end = getattr(tokenizer, "tokenizer", tokenizer).eos_token or ""
        sides = [side.removesuffix(end) + end for side in sides]
    else:
        if not getattr(tokenizer, "chat_template", None):
            remedy = "Use an -Instruct model, set `tokenizer.chat_template`, or use rows of text"
            raise InputError(
                f"processing_class: no chat template in the model's tokenizer for rows of messages. {remedy}."
            )
        options = {"tools": row.get("tools"), **(row.get("chat_template_kwargs") or {})}
        start_options = {"add_generation_prompt": True}
    try:
        start = list(_tokenize(tokenizer, prompt, **start_options, **options)["input_ids"])
        whole = [list(_tokenize(tokenizer, prompt + side, **options)["input_ids"]) for side in sides]
    except Exception as error:  # a template may raise what it likes
        remedy = "Correct the row, or set a template that takes it."
        raise InputError(f"The chat template cannot render this pair: {one_line(error)}. {remedy}") from error
    at = min(common_prefix_length(start, ids) for ids in whole)
    return start[:at], whole[0][at:], whole[1][at:]


def first_failure(rows: Any, name: str, processor: Any) -> str:
    """Return which row is the first that cannot be rendered, and why, or an empty string, as for a stream."""
    from datasets import IterableDataset

    for number, row in enumerate(() if isinstance(rows, IterableDataset) else rows):
        try:
            encode_pair(processor, row)
        except InputError as error:
            return f"Row {number} of the {name} dataset: {error}"
    return ""
