"""Preference datasets before training: check every row, drop degenerate pairs, carry `chosen_wins` into the batch."""

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
from apo_trl.io import rows as row_rules
from apo_trl.io.rows import degenerate_reason, validate_row

__all__ = ["CollatorWithWins", "check_dataset", "filter_degenerate_pairs", "filter_vision_pairs", "named_datasets"]

logger = get_logger(__name__)

_BATCH_SIZE = 1000  # rows; fewer are not worth a second process


def named_datasets(argument: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield every dataset of one argument of the trainer, with its name in messages."""
    if isinstance(argument, dict):
        for key, dataset in argument.items():
            yield f"{name} '{key}'", dataset
    elif isinstance(argument, (Dataset, IterableDataset)):
        yield name, argument


def check_dataset(dataset: Any, name: str, needs_wins: bool, args: Any = None) -> None:
    """Raise InputError for a missing column or the first invalid row of a dataset, or for the first row of a stream.

    `name` is that in messages, `needs_wins` whether the loss reads the column `chosen_wins`, and `args` the training
    arguments if all processes call this. Other kinds of datasets are left to TRL.
    """
    if isinstance(dataset, IterableDataset):
        from apo_trl.datasets.streams import check_streamed_row

        check_streamed_row(next(iter(dataset)), 0, name=name, needs_wins=needs_wins)
    if not isinstance(dataset, Dataset):
        return
    columns = list(dataset.column_names)
    required = ["chosen", "rejected", *(["chosen_wins"] if needs_wins else [])]
    for column in required:
        if column not in columns:
            why = ", required by the loss 'apo_blend'" if column == "chosen_wins" else ""
            raise InputError(
                f"The {name} dataset has no column '{column}'{why}; its columns are {columns}."
                f"{nearest(column, columns)} Add it, or rename one with `dataset.rename_column`."
            )
    if len(dataset) == 0:
        raise InputError(f"The {name} dataset has no rows. Use one with at least one pair.")
    validate = functools.partial(validate_row, needs_wins=needs_wins)
    problems = _reasons(dataset, ["prompt", *required], validate, f"Checking {name} dataset", args)
    if problems.null_count < len(problems):
        number = pc.index(pc.is_valid(problems), True).as_py()
        raise InputError(f"Row {number} of the {name} dataset {problems[number]}.")


def _reasons(dataset: Dataset, columns: list[str], reason: Callable[..., str | None], desc: str, args: Any) -> Any:
    """Return a reason or null for each row, as an Arrow column.

    The main process of a machine computes it; the others, and the next run, read it from the cache of `map`. A dataset
    in memory has no cache, so each process computes it.
    """
    rows = dataset.select_columns([column for column in columns if column in dataset.column_names])
    with nullcontext() if args is None else args.main_process_first(desc=desc):
        reasons = rows.map(
            _add_reasons,
            batched=True,
            batch_size=_BATCH_SIZE,
            # `datasets` hashes a function of a package by its name alone, and would not notice changed rules.
            fn_kwargs={"reason": reason, "rules": inspect.getsource(row_rules)},
            features=Features({"reason": Value("string")}),
            remove_columns=rows.column_names,
            num_proc=None if args is None or len(rows) <= _BATCH_SIZE else args.dataset_num_proc,
            desc=desc,
        )
    return reasons.data["reason"] if len(rows) else pa.nulls(0)  # `map` returns an empty dataset as it is


def _add_reasons(batch: Mapping[str, Any], reason: Callable[..., str | None], rules: str) -> dict[str, Any]:
    rows = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
    return {"reason": [reason(row) for row in rows]}


def filter_degenerate_pairs(
    dataset: Dataset, reason: Callable[..., str | None], name: str, dropped: Counter[str], args: Any = None
) -> Dataset:
    """Drop the pairs that have a reason, and count them in one warning, with those that were `dropped` before.

    `name` and `args` are those of `check_dataset`. Raises InputError if no pair is left.
    """
    total = len(dataset) + dropped.total()
    columns = ["prompt_ids", "chosen_ids", "rejected_ids", "chosen", "rejected"]
    reasons = _reasons(dataset, columns, reason, f"Looking for degenerate pairs in {name} dataset", args)
    dropped.update(reasons.drop_null().to_pylist())
    if not dropped.total():
        return dataset
    counts = ", ".join(f"{count} because {why}" for why, count in dropped.most_common() if count)
    if dropped.total() == total:
        raise InputError(
            f"All pairs of the {name} dataset are degenerate: {counts}. Check the data, or raise max_length."
        )
    logger.warning(
        f"Dropped {dropped.total()} of {total} pairs of the {name} dataset: {counts}. Set keep_degenerate_pairs=True "
        "in APOConfig to keep those that fit into max_length."
    )
    return dataset.select(pc.indices_nonzero(pc.is_null(reasons)).to_pylist())


def filter_vision_pairs(argument: Any, name: str, args: Any = None) -> Any:
    """Drop degenerate pairs of vision datasets by their texts; TRL tokenizes these only in the collator."""
    if isinstance(argument, dict):
        return {key: filter_vision_pairs(dataset, f"{name} '{key}'", args) for key, dataset in argument.items()}
    if isinstance(argument, Dataset) and {"image", "images"}.intersection(argument.column_names):
        return filter_degenerate_pairs(argument, degenerate_reason, name, Counter(), args)
    return argument


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
