"""Rows of text need an end token, and no second BOS token."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from accelerate.logging import get_logger
from datasets import Dataset

from apo_trl.errors import InputError

__all__ = ["check_special_tokens"]

logger = get_logger(__name__)


def check_special_tokens(dataset: Any, name: str, tokenizer: Any) -> None:
    """Warn of the first row of a dataset of texts whose prompt would begin with two BOS tokens.

    Raises:
        InputError: The tokenizer has no end token, with which the answers end.
    """
    if not tokenizer.eos_token:
        raise InputError(f"eos_token: required for the texts of the {name} dataset, not set. Set it in the tokenizer.")
    bos = tokenizer.bos_token
    if not bos or list(tokenizer(text=bos + "a")["input_ids"])[:2] != 2 * [tokenizer.bos_token_id]:
        return  # the tokenizer adds none
    column = dataset.data["prompt"] if isinstance(dataset, Dataset) else pa.array([next(iter(dataset))["prompt"]])
    number = pc.index(pc.starts_with(column, bos), True).as_py()
    if number >= 0:
        logger.warning(
            f"Row {number} of the {name} dataset has a prompt that begins with {bos!r}, which the tokenizer adds too: "
            "the model sees it twice. Remove it from the prompts."
        )
