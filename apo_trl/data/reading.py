"""Rows of any dataset, one at a time: of files as they are, compressed or not, of folders and the hub by `datasets`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..inputs import InputError, row_fault, split_conversation

__all__ = ["explicit", "folder_files", "read_pairs", "read_rows", "shared_start"]


def shared_start(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Count how many elements two sequences begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(one), len(other)))


def read_pairs(path: str, split: str = "train") -> Iterator[dict[str, Any]]:
    """Give the rows of a preference dataset one at a time, each with a `prompt` of the kind of its answers.

    `path` is as for `read_rows`. Where rows have no prompt, it is the shared start of both answers, as TRL finds it.
    Raises InputError for a row that is no pair.
    """
    number = 0
    for number, row in enumerate(read_rows(path, split), start=1):
        if fault := row_fault(row):
            raise InputError(f"Row {number} (counted from 1) of {path} {fault}.")
        yield explicit(row)
    if not number:
        raise InputError(f"{path} has no rows; give it at least one pair.")


def explicit(row: Mapping[str, Any]) -> dict[str, Any]:
    """Give a preference row with a `prompt` of the kind of its answers: its own, or what both answers begin with."""
    chosen, rejected = row["chosen"], row["rejected"]
    if "prompt" in row:
        mixed = isinstance(row["prompt"], str) and not isinstance(chosen, str)
        return {**row, **(split_conversation(row) if mixed else {})}
    at = shared_start(chosen, rejected)
    if at == min(len(chosen), len(rejected)):
        at = max(0, at - 1)  # each side keeps something
    elif at and chosen[at - 1] == " ":
        at -= 1  # a space belongs to the word after it
    return {**row, "prompt": chosen[:at], "chosen": chosen[at:], "rejected": rejected[at:]}


def read_rows(path: str, split: str = "train") -> Iterator[dict[str, Any]]:
    """Give the rows of a .jsonl, .json or .parquet file, also compressed, or of a folder or hub name, one at a time.

    The last two are opened by `datasets`, with `split`. Raises InputError where nothing can be read.
    """
    suffixes = [suffix for suffix in Path(path).suffixes if suffix not in (".gz", ".bz2", ".xz", ".zst")]
    kind = suffixes[-1] if suffixes and suffixes[-1] in (".jsonl", ".json", ".parquet") else None
    if kind and not Path(path).exists():
        raise InputError(f"There is no file {path}.")
    rows = _loaded(path, split) if kind is None or Path(path).is_dir() else _rows_of_file(path, kind)
    try:
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, Mapping):
                raise InputError(f"Row {number} (counted from 1) of {path} is no object with fields.")
            yield dict(row)
    except InputError:
        raise
    except (OSError, EOFError, ValueError) as error:  # also no JSON, no such dataset, no network
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())[:300]}") from error


def _rows_of_file(path: str, kind: str) -> Iterator[Any]:
    import fsspec

    if kind == ".parquet":
        import pyarrow.parquet

        # A packed file cannot be read from its end, where Parquet keeps its index: such a one is held as a whole.
        source = path
        if not path.endswith(kind):
            with fsspec.open(path, "rb", compression="infer") as file:
                source = pyarrow.BufferReader(file.read())
        for batch in pyarrow.parquet.ParquetFile(source).iter_batches(batch_size=1000):
            yield from batch.to_pylist()
        return
    with fsspec.open(path, "rt", encoding="utf-8-sig", compression="infer") as file:
        for number, line in enumerate(file, start=1):
            if line.lstrip().startswith("["):
                yield from _elements(file, line.lstrip()[1:])
                return
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise InputError(f"Line {number} of {path} is not JSON: {error}.") from error


def _elements(file: Any, text: str) -> Iterator[Any]:
    """Give the elements of a JSON array one at a time; `text` is what was read of it after its bracket."""
    decoder = json.JSONDecoder()
    while True:
        text = text.lstrip(" \t\r\n,")
        if text.startswith("]"):
            return
        try:
            element, end = decoder.raw_decode(text)
        except json.JSONDecodeError:  # mostly because it goes on after what was read
            more = file.read(max(1 << 16, len(text)))
            if not more:
                raise
            text += more
        else:
            yield element
            text = text[end:]


def _loaded(path: str, split: str) -> Iterator[Any]:
    import datasets

    builder, files = folder_files(path) if Path(path).is_dir() else (path, None)
    yield from datasets.load_dataset(builder, data_files=files, split=split, streaming=True)


def folder_files(path: str, name: str | None = None) -> tuple[str, dict[str, list[str]] | None]:
    """Give the builder of `datasets` for a folder, and the files of each split as the folder's card names them.

    To be loaded by these: under the folder's name `datasets` (5.2.0) keeps what it once made of a folder with a card,
    and gives that again when its files have been written anew. What is neither JSON nor Parquet stays the folder.
    """
    import datasets

    builder = datasets.load_dataset_builder(path, name)
    if builder.name not in ("json", "parquet") or not builder.config.data_files:
        return path, None
    return builder.name, {str(split): list(map(str, files)) for split, files in builder.config.data_files.items()}
