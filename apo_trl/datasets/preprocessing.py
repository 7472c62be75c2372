"""Datasets on their way into training: checked before all else, screened once they are tokens, carried to the batch.

`inputs.py` has the rules for one row; here they meet `datasets.Dataset` and `datasets.IterableDataset`.
"""

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate.logging import get_logger
from datasets import Dataset, Features, IterableDataset, Value

from apo_trl.errors import InputError, nearest
from apo_trl.io import rows as inputs
from apo_trl.io.rows import degenerate_reason, validate_row

__all__ = [
    "CollatorWithWins",
    "StreamFilter",
    "check_dataset",
    "check_streamed_row",
    "filter_degenerate_pairs",
    "filter_vision_pairs",
    "named_datasets",
]

logger = get_logger(__name__)


def named_datasets(given: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Give every dataset that was passed as one argument, with what messages call it."""
    if isinstance(given, dict):
        for key, dataset in given.items():
            yield f"{name} '{key}'", dataset
    elif isinstance(given, (Dataset, IterableDataset)):
        yield name, given


def check_dataset(dataset: Any, name: str, needs_wins: bool, args: Any = None) -> None:
    """Raise InputError for the first bad row of a dataset, or for a bad first row of a stream.

    Args:
        dataset: A dataset or a stream; anything else is left to TRL.
        name: What the message calls it ("train", "eval").
        needs_wins: Whether the loss reads the column `chosen_wins`.
        args: The training arguments, with which every process calls it, or None.
    """
    if isinstance(dataset, IterableDataset):
        check_streamed_row(next(iter(dataset)), 0, name=name, needs_wins=needs_wins)
    if not isinstance(dataset, Dataset):
        return
    columns = list(dataset.column_names)
    needed = ["chosen", "rejected", *(["chosen_wins"] if needs_wins else [])]
    for column in needed:
        if column not in columns:
            why = ", which the loss 'apo_blend' needs" if column == "chosen_wins" else ""
            raise InputError(
                f"The {name} dataset has no column '{column}'{why}; its columns are {columns}."
                f"{nearest(column, columns)} Add it, or rename one with `dataset.rename_column`."
            )
    if len(dataset) == 0:
        raise InputError(f"The {name} dataset has no rows; give it at least one pair.")
    fault = functools.partial(validate_row, needs_wins=needs_wins)
    faults = _reasons(dataset, ["prompt", *needed], fault, f"Checking {name} dataset", args)
    if faults.null_count < len(faults):
        number = pc.index(pc.is_valid(faults), True).as_py()
        raise InputError(f"Row {number} of the {name} dataset {faults[number]}.")


def _reasons(dataset: Dataset, columns: list[str], reason: Callable[..., str | None], desc: str, args: Any) -> Any:
    """Return a reason or null for each row, an Arrow column.

    The main process of a machine computes it and the others read it from the cache of `map`, as does the next run.
    Rows that were never in a file have no cache: there each process computes it.
    """
    rows = dataset.select_columns([column for column in columns if column in dataset.column_names])
    with nullcontext() if args is None else args.main_process_first(desc=desc):
        found = rows.map(
            _with_reasons,
            batched=True,
            batch_size=_BATCH,
            # `datasets` hashes a function of a package by its name alone, so that changed rules would not be noticed.
            fn_kwargs={"reason": reason, "rules": inspect.getsource(inputs)},
            features=Features({"reason": Value("string")}),
            remove_columns=rows.column_names,
            num_proc=None if args is None or len(rows) <= _BATCH else args.dataset_num_proc,
            desc=desc,
        )
    return found.data["reason"] if len(rows) else pa.nulls(0)  # `map` returns an empty dataset as it is


_BATCH = 1000  # rows; fewer are not worth a second process


def _with_reasons(batch: Mapping[str, Any], reason: Callable[..., str | None], rules: str) -> dict[str, Any]:
    rows = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
    return {"reason": [reason(row) for row in rows]}


def check_streamed_row(row: dict[str, Any], number: int, *, name: str, needs_wins: bool) -> dict[str, Any]:
    """Give the row back, or raise InputError for it: the check that a stream is mapped with."""
    if fault := validate_row(row, needs_wins=needs_wins):
        raise InputError(f"Row {number} of the {name} stream {fault}.")
    return row


def filter_degenerate_pairs(
    dataset: Dataset, reason: Callable[..., str | None], name: str, dropped: Counter[str], args: Any = None
) -> Dataset:
    """Leave out the pairs for which there is a reason, and say in one warning how many were dropped and why."""
    before = len(dataset) + dropped.total()
    columns = ["prompt_ids", "chosen_ids", "rejected_ids", "chosen", "rejected"]
    reasons = _reasons(dataset, columns, reason, f"Looking for useless pairs in {name} dataset", args)
    dropped.update(reasons.drop_null().to_pylist())
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
    return dataset.select(pc.indices_nonzero(pc.is_null(reasons)).to_pylist())


def filter_vision_pairs(given: Any, name: str, args: Any = None) -> Any:
    """Screen vision datasets by their texts alone; the host prepares them only in the collator."""
    if isinstance(given, dict):
        return {key: filter_vision_pairs(dataset, f"{name} '{key}'", args) for key, dataset in given.items()}
    if isinstance(given, Dataset) and {"image", "images"}.intersection(given.column_names):
        return filter_degenerate_pairs(given, degenerate_reason, name, Counter(), args)
    return given


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
