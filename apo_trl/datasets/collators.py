"""Collators around TRL's: rows with images in their normal form, and the column `chosen_wins` in the batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from apo_trl.errors import InputError
from apo_trl.io.messages import one_line
from apo_trl.io.rows import normalise_row

__all__ = ["CollatorWithWins", "VisionCollator", "render_images"]


@dataclass
class VisionCollator:
    """A collator that normalises rows with images, which TRL reads as they stand in the dataset."""

    collator: Callable[[list[dict[str, Any]]], Any]

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        """Collate the rows in their normal form."""
        return self.collator([normalise_row(example, vision=True) for example in examples])


def render_images(row: dict[str, Any], name: str, processor: Any) -> None:
    """Render the first row of a dataset with images, or raise InputError if its processor cannot."""
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    try:
        VisionCollator(DataCollatorForVisionPreference(processor))([row])
    except Exception as error:  # a processor and its template may raise what they like
        fault = f"Row 0 of the {name} dataset cannot be rendered: {one_line(error)}"
        raise InputError(f"{fault}. Correct the row, or set another chat template.") from error


@dataclass
class CollatorWithWins:
    """A collator that adds the column `chosen_wins` to the batch of another collator."""

    collator: Callable[[list[dict[str, Any]]], Any]

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        """Collate, with the column as a float32 tensor of shape (pairs,)."""
        wins = torch.tensor([example["chosen_wins"] for example in examples], dtype=torch.float32)
        batch = self.collator(examples)
        batch["chosen_wins"] = wins
        return batch
