"""The reader of dataset files: JSONL, JSON and Parquet, also compressed; folders and hub names through `datasets`.

`load_dataset` returns what TRL trains on; `read_rows` yields rows as they stand in a file, for tools that hold one.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from apo_trl.errors import InputError, InvalidRow
from apo_trl.io.error_text import one_line
from apo_trl.io.resources import check_path, nearest_path, packaged
from apo_trl.io.rows import ROW_COLUMNS, normalise_row, row_form

__all__ = [
    "check_dataset",
    "file_builder",
    "is_local",
    "load_dataset",
    "load_dataset_splits",
    "loading_errors",
    "open_text",
]
__all__ += ["read_pairs", "read_rows", "valid_rows"]

_BUILDERS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}
_COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}


def file_builder(path: str) -> str | None:
    """Return the builder of `datasets` for a data file, "json" or "parquet", or None for any other name or folder."""
    suffixes = [suffix for suffix in Path(path.lower()).suffixes if suffix not in _COMPRESSED]
    return None if Path(path).is_dir() or not suffixes else _BUILDERS.get(suffixes[-1])


def open_text(path: str | Path, errors: str = "strict") -> Any:
    """Open a text file in UTF-8, with or without a byte order mark, compressed or not."""
    import fsspec

    return fsspec.open(str(path), "rt", encoding="utf-8-sig", errors=errors, compression="infer")


def read_pairs(path: str, split: str = "train") -> Iterator[dict[str, Any]]:
    """Yield the rows of a preference dataset in their normal form, or raise InputError for an invalid one, or none."""
    empty = True
    for _, row in _valid_rows(path, split):
        empty = False
        yield row
    if empty:
        raise InputError(f"{path}: no rows. Use a dataset with at least one pair.")


def valid_rows(path: str, split: str = "train") -> Iterator[dict[str, Any]]:
    """Yield the rows of a preference dataset unchanged, or raise InputError for an invalid one."""
    yield from (row for row, _ in _valid_rows(path, split))


def _valid_rows(path: str, split: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    form = None
    for number, row in enumerate(read_rows(path, split), start=1):
        try:
            form = form or row_form(row)
            normal = normalise_row(row, form=form)
        except InvalidRow as error:
            raise InputError(f"Row {number} (counted from 1) of {path} {error}.") from error
        yield row, normal


def read_rows(path: str, split: str = "train") -> Iterator[dict[str, Any]]:
    """Yield the rows of a .jsonl, .json or .parquet file, also compressed, or of a split of a folder or hub name.

    Raises InputError if the dataset cannot be read, or a row is not an object.
    """
    builder, file = file_builder(path), str(packaged(path) or path)
    check_dataset(path, "dataset")
    try:
        rows = _rows_of_file(file, builder) if builder else load_dataset(path, split=split, streaming=True)
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, Mapping):
                raise InputError(f"Row {number} (counted from 1) of {path} is not a JSON object. Correct or remove it.")
            yield dict(row)
    except InputError:
        raise
    except (OSError, EOFError, ValueError) as error:  # also invalid JSON, a missing dataset, no network
        raise InputError(f"{path}: cannot be read: {one_line(error)}. Check it.") from error


def _rows_of_file(path: str, builder: str) -> Iterator[Any]:
    if builder == "parquet":
        import fsspec
        import pyarrow.parquet

        source = path
        if not path.endswith(".parquet"):  # Parquet is read from its end, so a compressed file is held in memory
            with fsspec.open(path, "rb", compression="infer") as file:
                source = pyarrow.BufferReader(file.read())
        for batch in pyarrow.parquet.ParquetFile(source).iter_batches(batch_size=1000):
            yield from batch.to_pylist()
        return
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.lstrip().startswith("["):
                yield from _elements(file, line.lstrip()[1:])
                return
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise InputError(f"Line {number} of {path} is not JSON: {error}. Correct or remove it.") from error


def _elements(file: Any, text: str) -> Iterator[Any]:
    """Yield the elements of a JSON array; `text` is what was read after its bracket."""
    decoder = json.JSONDecoder()
    while True:
        text = text.lstrip(" \t\r\n,")
        if text.startswith("]"):
            return
        try:
            element, end = decoder.raw_decode(text)
        except json.JSONDecodeError:  # mostly because the element continues after what was read
            more = file.read(max(1 << 16, len(text)))
            if not more:
                raise
            text += more
        else:
            yield element
            text = text[end:]


def _folder_files(path: str, name: str | None = None) -> tuple[str, dict[str, list[str]] | None]:
    """Return the builder of `datasets` for a folder of JSON or Parquet, and the files of each split by its card.

    Under the folder's name, `datasets` (5.2.0) returns its cache of a folder with a card even if files have changed.
    """
    import datasets

    builder = datasets.load_dataset_builder(path, name)
    if builder.name not in ("json", "parquet") or not builder.config.data_files:
        return path, None
    return builder.name, {str(split): list(map(str, files)) for split, files in builder.config.data_files.items()}


def is_local(path: str) -> bool:
    """Return whether a dataset's name is a local file or folder."""
    return Path(path).exists() or packaged(path) is not None


def check_dataset(name: str, field: str = "dataset_name") -> None:
    """Raise InputError if a dataset's name is the path of nothing, or of a file of another format."""
    check_path(name, field, "file")
    if file_builder(name) and not is_local(name):
        raise InputError(f"{field}: file {name} not found.{nearest_path(name)} Check the path.")
    if Path(name).is_file() and not file_builder(name):
        raise InputError(f"{field}: format not supported, got '{name}'. Convert it to {', '.join(_BUILDERS)}.")


def load_dataset(path: str, *args: Any, **kwargs: Any) -> Any:
    """Load like `datasets.load_dataset`; `path` may also be a .jsonl, .json or .parquet file, compressed or not."""
    from datasets.load import load_dataset  # `apo_trl.run` puts ours in the place of `datasets.load_dataset`

    path = str(packaged(path) or path)
    if any(Path(path, file).is_file() for file in ("state.json", "dataset_dict.json")):
        return _load_from_disk(path, kwargs.get("split"), bool(kwargs.get("streaming")))
    if (builder := file_builder(path)) and Path(path).is_file():
        kwargs.pop("name", None)
        return _load_files(builder, path, kwargs)
    if Path(path).is_dir() and not {"data_files", "data_dir"} & kwargs.keys() and len(args) < 2:
        folder, files = _folder_files(path, args[0] if args else kwargs.get("name"))
        if files:
            kwargs.pop("name", None)
            return _load_files(folder, files, kwargs)
    return load_dataset(path, *args, **kwargs)


def _load_files(builder: str, files: Any, kwargs: dict[str, Any]) -> Any:
    """Load files; what JSON has in the columns of a row stays as it is, and is not typed by what pyarrow makes of it.

    It would read dates as timestamps, and give all objects the keys, the order and the numbers of the first.
    """
    from datasets import Features, Json, List, Value
    from datasets.exceptions import DatasetGenerationError
    from datasets.load import load_dataset

    if builder != "json" or kwargs.get("streaming") or "features" in kwargs:
        return load_dataset(builder, data_files=files, **kwargs)
    try:
        loaded = load_dataset(builder, data_files=files, **kwargs)
    except DatasetGenerationError:
        return load_dataset(builder, data_files=files, features=_features_of(files), **kwargs)
    first = loaded[0] if isinstance(loaded, list) else loaded
    features = (next(iter(first.values())) if isinstance(first, dict) else first).features
    simple = (Value("string"), List({"role": Value("string"), "content": Value("string")}))
    kept = {name: Json() for name, kind in features.items() if name in ROW_COLUMNS and kind not in simple}
    return load_dataset(builder, data_files=files, features=Features(features | kept), **kwargs) if kept else loaded


def _features_of(files: Any) -> Any:
    """Return features that hold every row of JSON files; `datasets` takes those of the first 10 MB for all rows."""
    from datasets import Features, Json, Value

    types: dict[str, set[type]] = {}
    for path in [files] if isinstance(files, str) else chain.from_iterable(files.values()):
        for row in _rows_of_file(path, "json"):
            for name, value in row.items():
                types.setdefault(name, set()).add(type(value))
    plain: dict[frozenset[type], str] = {
        frozenset(): "null", frozenset({str}): "string", frozenset({bool}): "bool", frozenset({int}): "int64",
        frozenset({float}): "float64", frozenset({int, float}): "float64",
    }  # fmt: skip
    kinds = {name: plain.get(frozenset(found - {type(None)})) for name, found in types.items()}
    return Features({name: Value(kind) if kind else Json() for name, kind in kinds.items()})


def _load_from_disk(path: str, split: Any, streaming: bool) -> Any:
    """Load a folder of `save_to_disk` as `load_dataset` returns others; a single dataset is the split "train"."""
    from datasets import Dataset, DatasetDict, load_from_disk

    saved = load_from_disk(path)
    splits = DatasetDict({"train": saved}) if isinstance(saved, Dataset) else saved
    if split is not None and str(split) not in splits:
        raise InputError(f"{path}: no split '{split}'. Use one of {', '.join(splits)}, whole.")
    if streaming:
        splits = {name: dataset.to_iterable_dataset() for name, dataset in splits.items()}
    return splits if split is None else splits[str(split)]


def load_dataset_splits(
    name: str, *, config: str | None = None, streaming: bool = False, field: str = "dataset_name"
) -> Any:
    """Load a file, a folder or a hub name as a dictionary of splits; `field` is the setting that named it."""
    check_dataset(name, field)
    with loading_errors(name):
        return load_dataset(name, name=config, streaming=streaming)


@contextlib.contextmanager
def loading_errors(name: str) -> Iterator[None]:
    """Turn what a loader of `datasets` raises into an InputError that names the dataset."""
    try:
        yield
    except Exception as error:  # a builder of `datasets` may raise anything of its file format
        fault = _first_bad_line(Path(name)) if Path(name).is_file() else None
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        if "corresponds to no data" in str(root):
            raise InputError(f"dataset '{name}': has no rows. Use one with at least one pair.") from error
        reason = fault or f"{type(root).__name__}: {root}".rstrip(": ")
        raise InputError(f"dataset '{name}': cannot be loaded: {reason}. Check the name or the file.") from error


def _first_bad_line(path: Path) -> str | None:
    if ".jsonl" not in path.suffixes:
        return None
    number = 0
    try:
        with open_text(path) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f"line {number} is not a JSON object"
    except json.JSONDecodeError as error:
        return f"line {number} is not JSON ({error})"
    except (OSError, EOFError, UnicodeDecodeError) as error:
        return f"the file breaks off or is damaged after line {number} ({error})"
    return "the file has no rows" if number == 0 else None
