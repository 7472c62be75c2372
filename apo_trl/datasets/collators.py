"""The collator around TRL's for rows with images, which it normalises, or with `chosen_wins`, which the batch gets."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from apo_trl.errors import InputError
from apo_trl.io.error_text import one_line
from apo_trl.io.rows import normalise_row

__all__ = ["RowCollator", "render_images"]


@dataclass
class RowCollator:
    """Normalise rows with images, which TRL reads as they are in the dataset, and add `chosen_wins` to their batch."""

    collator: Callable[[list[dict[str, Any]]], Any]
    vision: bool = False
    wins: bool = False

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        """Collate, with `chosen_wins` as a float32 tensor of shape (pairs,)."""
        columns = {}
        if self.wins:
            columns["chosen_wins"] = torch.tensor([row["chosen_wins"] for row in examples], dtype=torch.float32)
        if self.vision:
            examples = [normalise_row(row, vision=True) for row in examples]
        batch = self.collator(examples)
        batch.update(columns)
        return batch


def render_images(row: dict[str, Any], name: str, processor: Any) -> None:
    """Render the first row of a dataset with images, or raise InputError if its processor cannot."""
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    if not hasattr(processor, "image_processor"):
        raise InputError(f"The {name} dataset has images, and the model reads text only. Remove the column.")
    try:
        RowCollator(DataCollatorForVisionPreference(processor), vision=True)([row])
    except Exception as error:  # a processor and its template may raise what they like
        fault = f"Row 0 of the {name} dataset cannot be rendered: {one_line(error)}"
        raise InputError(f"{fault}. Correct the row, or set another chat template.") from error
