"""Preference datasets before training: every row in its normal form, degenerate pairs dropped and counted."""

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, Json, Value, concatenate_datasets

from apo_trl import io
from apo_trl.config import has_option
from apo_trl.errors import InputError, InvalidRow
from apo_trl.io.rows import OTHER_FORMATS, degenerate_reason, normalise_row, row_form

__all__ = ["filter_degenerate_pairs", "map_datasets", "normalise_datasets"]

_BATCH_SIZE = 1000  # rows; fewer are not worth a second process
_REASON = {"reason": Value("string")}
_IMAGES = {"image", "images"}
_RULES = "".join(path.read_text("utf-8") for path in sorted(Path(io.__path__[0]).glob("*.py")))


def map_datasets(argument: Any, name: str, function: Callable[[Any, str], Any]) -> Any:
    """Apply a function to every dataset of one argument of the trainer, with its name in messages."""
    if isinstance(argument, dict) and name != "train":  # TRL refuses several to train on
        return {key: map_datasets(dataset, f"{name} '{key}'", function) for key, dataset in argument.items()}
    return function(argument, name) if isinstance(argument, (Dataset, IterableDataset)) else argument


def normalise_datasets(argument: Any, name: str, needs_wins: bool = False, args: Any = None) -> Any:
    """Return every dataset of one argument of the trainer with its rows in their normal form.

    A stream, and a dataset with images, is checked and stays as it is; degenerate pairs with images are dropped by
    their texts, unless `args` keeps them, since TRL tokenizes these only in the collator.

    Args:
        argument: A dataset, or a dictionary of datasets. Anything else is left to TRL.
        name: "train" or "eval", for messages.
        needs_wins: Whether the loss reads the column `chosen_wins`.
        args: The training arguments, if all processes call this.

    Raises:
        InputError: A column is missing, there are no rows, or a row is invalid, the first of a stream.
    """
    return map_datasets(argument, name, functools.partial(_normalise, needs_wins=needs_wins, args=args))


def _normalise(dataset: Any, name: str, *, needs_wins: bool, args: Any) -> Any:
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        from apo_trl.io.columns import transform_error

        raise transform_error(name)
    dataset = dataset.with_format(None)
    if isinstance(dataset, IterableDataset):
        from apo_trl.datasets.streams import check_first_row

        check_first_row(dataset, name, needs_wins)
        return dataset
    columns = list(dataset.column_names)
    for column in ("chosen", "rejected", *(["chosen_wins"] if needs_wins else [])):
        if column not in columns:
            from apo_trl.io.columns import missing_column

            raise InputError(f"The {name} dataset {missing_column(column, columns)}.")
    if len(dataset) == 0:
        raise InputError(f"The {name} dataset has no rows. Use one with at least one pair.")
    form, vision = row_form(dataset.select_columns("chosen")[0]), not _IMAGES.isdisjoint(columns)
    options: dict[str, Any] = {"form": form, "needs_wins": needs_wins, "vision": vision}
    kind = Value("string") if form == "text" else Json()
    kinds: dict[str, Any] = dict.fromkeys(("prompt", "chosen", "rejected"), kind)
    kinds |= {column: Json() for column in ("tools", "chat_template_kwargs") if column in columns}
    narrow = "prompt" in columns and not dataset.data["prompt"].null_count  # else the question may be elsewhere
    read = [*kinds, "chosen_wins"] if narrow else [name for name in columns if name not in _IMAGES]
    function = functools.partial(_normal_columns, columns=[] if vision else list(kinds), **options)
    features = Features(_REASON if vision else _REASON | kinds)
    normal = _map(dataset, read, function, features, f"Reading {name} dataset", args)
    valid = pc.is_null(normal.data["reason"])
    if (number := pc.index(valid, False).as_py()) >= 0:
        raise InputError(f"Row {number} of the {name} dataset {normal[number]['reason']}.")
    if vision:
        keeps = has_option(args, "keep_degenerate_pairs")
        return dataset if keeps else _filter_pairs(dataset, {"vision": True}, name, Counter(), args)
    rest = dataset.remove_columns([column for column in columns if column in kinds or column in OTHER_FORMATS])
    normal = normal.remove_columns("reason")
    return concatenate_datasets([normal, rest], axis=1) if rest.column_names else normal


def _normal_columns(row: Mapping[str, Any], *, columns: list[str], **options: Any) -> dict[str, Any]:
    try:
        normal, reason = normalise_row(row, **options), None
    except InvalidRow as error:
        normal, reason = {}, str(error)
    return {column: normal.get(column) for column in columns} | {"reason": reason}


def _map(
    dataset: Dataset, read: list[str], function: Callable[..., dict[str, Any]], features: Features, desc: str, args: Any
) -> Dataset:
    """Map a function over rows, of the columns `read`; the result has no others than `features`.

    The main process of a machine computes it; the others, and the next run, read it from the cache of `map`. A dataset
    in memory has no cache, so each process computes it.
    """
    dataset = dataset.select_columns([column for column in read if column in dataset.column_names])
    with nullcontext() if args is None else args.main_process_first(desc=desc):
        return dataset.map(
            _by_row,
            batched=True,
            batch_size=_BATCH_SIZE,
            # `datasets` hashes a function of a package by its name alone, and would not notice changed rules.
            fn_kwargs={"function": function, "rules": _RULES},
            features=features,
            remove_columns=dataset.column_names,
            num_proc=None if args is None or len(dataset) <= _BATCH_SIZE else args.dataset_num_proc,
            desc=desc,
        )


def _by_row(batch: Mapping[str, Any], function: Callable[..., dict[str, Any]], rules: str) -> dict[str, list[Any]]:
    results = [function(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)]
    return {column: [result[column] for result in results] for column in results[0]}


def filter_degenerate_pairs(dataset: Any, name: str, args: Any, *, before: int, eos_token: str) -> Any:
    """Drop the degenerate pairs of a tokenized dataset, unless `args` keeps them, and warn of their number.

    TRL has tokenized it from `before` rows, and dropped those whose prompt is too long. `name` and `args` are those of
    `normalise_datasets`. Pairs of a stream are dropped as they arrive. Raises InputError if no pair is left.
    """
    if has_option(args, "keep_degenerate_pairs"):
        return dataset
    options = {"max_length": args.max_length, "keep_end": args.truncation_mode == "keep_end", "eos_token": eos_token}
    if isinstance(dataset, IterableDataset):
        from apo_trl.datasets.streams import StreamFilter

        return dataset.filter(StreamFilter(options, name))
    too_long = {f"the prompt alone fills max_length={args.max_length}": before - len(dataset)}
    return _filter_pairs(dataset, options, name, Counter(too_long), args)


def _filter_pairs(dataset: Dataset, options: dict[str, Any], name: str, dropped: Counter[str], args: Any) -> Dataset:
    total = len(dataset) + dropped.total()
    if len(dataset):  # `map` returns an empty dataset as it is
        read = ["prompt_ids", "chosen_ids", "rejected_ids", "prompt", "chosen", "rejected"]
        function = functools.partial(_reason_column, **options)
        desc = f"Looking for degenerate pairs in {name} dataset"
        reasons = _map(dataset, read, function, Features(_REASON), desc, args).data["reason"]
        dropped.update(reasons.drop_null().to_pylist())
    if not dropped.total():
        return dataset
    from apo_trl.datasets.dropped import report_dropped

    report_dropped(dropped, total, name)
    return dataset.select(pc.indices_nonzero(pc.is_null(reasons)).to_pylist())


def _reason_column(row: Mapping[str, Any], *, vision: bool = False, **options: Any) -> dict[str, Any]:
    return {"reason": degenerate_reason(normalise_row(row, vision=True) if vision else row, **options)}
