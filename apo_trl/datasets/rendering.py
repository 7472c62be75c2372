"""The first row of every dataset is rendered before the model is loaded."""

from typing import Any

from datasets import IterableDataset
from trl import apply_chat_template

from apo_trl.datasets.preprocessing import map_datasets
from apo_trl.errors import InputError

__all__ = ["render_first_rows"]


def render_first_rows(argument: Any, name: str, needs_wins: bool, processor: Any) -> Any:
    """Render the first row of every dataset of one argument of the trainer, and return the argument.

    Rows of streams are normalised and rendered as they arrive. Warns of prompts that begin with the BOS token, if the
    tokenizer adds it too.

    Raises:
        InputError: The tokenizer, or the processor of a vision model, cannot render a row.
    """

    def render(dataset: Any, name: str) -> Any:
        if isinstance(dataset, IterableDataset):
            from apo_trl.datasets.streams import normalise_stream

            dataset = normalise_stream(dataset, name, needs_wins, processor)
        first = next(iter(dataset))
        if "image" in first or "images" in first:
            from apo_trl.datasets.collators import render_images

            render_images(first, name, processor)
        elif isinstance(first["prompt"], str):
            from apo_trl.datasets.texts import check_special_tokens

            check_special_tokens(dataset, name, getattr(processor, "tokenizer", processor))
        else:
            try:
                apply_chat_template(first, processor, first.get("tools"))
            except Exception as error:  # a template may raise what it likes
                from apo_trl.io.tokenization import first_failure

                if failure := first_failure([first], name, processor):
                    raise InputError(failure) from error
        return dataset

    return map_datasets(argument, name, render)
