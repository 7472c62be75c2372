"""Write the pairs as Parquet."""

import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["is_writable", "to_parquet"]

_CHUNK = 1000


def to_parquet(source: Path, target: Path) -> None:
    """Write a JSONL file of pairs as Parquet, in chunks; values that fit no common type become JSON text."""
    text = pa.string()
    plain, extra = [("role", text), ("content", text)], _extra_types(source)
    schema = pa.schema(
        [("id", text), ("prompt", pa.list_(pa.struct([*plain, *extra.items()])))]
        + [(side, pa.list_(pa.struct(plain))) for side in ("chosen", "rejected")]
        + [(name, text) for name in ("rationale", "method", "chosen_model", "rejected_model", "judge_model")]
        + [("margin", pa.float64())]
    )
    as_text = {key for key, kind in extra.items() if kind == text}
    with pq.ParquetWriter(target, schema) as writer:
        for rows in _chunks(source):
            for message in (message for row in rows for message in row["prompt"]):
                for key in as_text & message.keys():
                    if not isinstance(message[key], str | None):
                        message[key] = json.dumps(message[key], ensure_ascii=False)
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def _extra_types(source: Path) -> dict[str, Any]:
    """Return a type for each key of the prompts' messages beside role and content."""
    types: dict[str, Any] = {}
    for rows in _chunks(source):
        messages = [message for row in rows for message in row["prompt"]]
        for key in sorted({key for message in messages for key in message} - {"role", "content"}):
            try:
                new = pa.array([message.get(key) for message in messages]).type
                both = [pa.schema([(key, kind)]) for kind in (types.get(key, new), new)]
                types[key] = pa.unify_schemas(both, promote_options="permissive").field(key).type
            except (pa.ArrowException, OverflowError):  # different types; a string unifies with no other type later
                types[key] = pa.string()
    return {key: kind if is_writable(kind) else pa.string() for key, kind in types.items()}


def is_writable(kind: Any) -> bool:
    """Return whether Parquet has a type of pyarrow: it has no objects without keys."""
    try:
        pq.write_table(pa.table({"": pa.array([], kind)}), io.BytesIO())
    except pa.ArrowNotImplementedError:
        return False
    return True


def _chunks(path: Path) -> Iterator[list[dict[str, Any]]]:
    with path.open(encoding="utf-8") as file:
        while rows := [json.loads(line) for line in itertools.islice(file, _CHUNK)]:
            yield rows
