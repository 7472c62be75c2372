"""Prompts that begin with the BOS token, if the tokenizer adds it too."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from accelerate.logging import get_logger
from datasets import Dataset

__all__ = ["warn_of_second_bos"]

logger = get_logger(__name__)


def warn_of_second_bos(dataset: Any, name: str, tokenizer: Any) -> None:
    """Warn of the first row of a dataset of texts whose prompt would begin with two BOS tokens."""
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
