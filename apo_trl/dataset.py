"""Datasets on their way into training: checked before all else, screened once they are tokens, carried to the batch.

`inputs.py` has the rules for one row; here they meet `datasets.Dataset` and `datasets.IterableDataset`.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import tqdm
from datasets import Dataset, IterableDataset

from .inputs import InputError, check_rows, row_fault

__all__ = ["CollatorWithWins", "StreamFilter", "check_dataset", "check_stream_row", "named", "without_useless"]

logger = get_logger(__name__)


def named(datasets: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Give every dataset that was passed as one argument, with what messages call it."""
    if isinstance(datasets, dict):
        for key, dataset in datasets.items():
            yield f"{name} '{key}'", dataset
    elif isinstance(datasets, (Dataset, IterableDataset)):
        yield name, datasets


def check_dataset(dataset: Any, name: str, needs_wins: bool) -> None:
    """Raise InputError for the first bad row of a dataset, or for a bad first row of a stream."""
    if isinstance(dataset, Dataset):
        check_rows(dataset, name, needs_wins=needs_wins)
    elif isinstance(dataset, IterableDataset):
        check_stream_row(next(iter(dataset)), 0, name=name, needs_wins=needs_wins)


def check_stream_row(row: dict[str, Any], number: int, *, name: str, needs_wins: bool) -> dict[str, Any]:
    """Give the row back, or raise InputError for it: the check that a stream is mapped with."""
    if fault := row_fault(row, needs_wins=needs_wins):
        raise InputError(f"Row {number} of the {name} stream {fault}.")
    return row


def without_useless(
    dataset: Dataset, reason: Callable[[dict[str, Any]], str | None], name: str, dropped: Counter[str]
) -> Dataset:
    """Leave out the pairs for which there is a reason, and say in one warning how many were dropped and why."""
    before = len(dataset) + dropped.total()
    columns = {"prompt_ids", "chosen_ids", "rejected_ids", "chosen", "rejected"}.intersection(dataset.column_names)
    rows = dataset.select_columns(list(columns))
    reasons = [reason(row) for row in tqdm(rows, desc=f"Looking for useless pairs in {name} dataset", delay=2)]
    dropped.update(filter(None, reasons))
    if not dropped.total():
        return dataset
    counts = ", ".join(f"{count} where {why}" for why, count in dropped.most_common() if count)
    if dropped.total() == before:
        raise InputError(
            f"No pair of the {name} dataset can teach anything: {counts}. Look at the data, or raise max_length."
        )
    logger.warning(
        f"Left out {dropped.total()} of {before} pairs of the {name} dataset: {counts}. Set keep_degenerate_pairs=True "
        "in APOConfig to keep those that fit into max_length."
    )
    return dataset.select([index for index, why in enumerate(reasons) if why is None])


@dataclass
class StreamFilter:
    """Keep the rows of a stream that can teach something; say so once when one cannot."""

    reason: Callable[[dict[str, Any]], str | None]
    name: str
    warned: bool = False

    def __call__(self, row: dict[str, Any]) -> bool:
        """Say whether the row stays."""
        reason = self.reason(row)
        if reason and not self.warned:
            self.warned = True
            logger.warning(
                f"The {self.name} stream has pairs that can teach nothing (first: {reason}); they are left out as they "
                "arrive. Set keep_degenerate_pairs=True in APOConfig to keep them."
            )
        return reason is None


@dataclass
class CollatorWithWins:
    """A collator that carries the column `chosen_wins` around another one."""

    collator: Callable[[list[dict[str, Any]]], Any]

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        """Collate, with the column as a float32 tensor of shape (pairs,)."""
        wins = torch.tensor([example["chosen_wins"] for example in examples], dtype=torch.float32)
        batch = self.collator(examples)
        batch["chosen_wins"] = wins
        return batch
