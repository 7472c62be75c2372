"""The pairs as Parquet: one type for every column, whatever the messages of a prompt hold beside role and content."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["to_parquet"]

_CHUNK = 1000
_PLAIN = ("role", "content")


def to_parquet(source: Path, target: Path) -> None:
    """Write the lines of a JSONL file of pairs as Parquet, in pieces.

    A message has every key that any has, null where it lacks it. What no column can hold, values of different types
    or objects without keys, is written as JSON text.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.string()
    messages = pa.list_(pa.struct([("role", text), ("content", text)]))
    types = _types(source)
    prompt = pa.list_(pa.struct([*((name, text) for name in _PLAIN), *types.items()]))
    schema = pa.schema(
        [("id", text), ("prompt", prompt), ("chosen", messages), ("rejected", messages), ("rationale", text)]
        + [(name, text) for name in ("method", "chosen_model", "rejected_model", "judge_model")]
        + [("margin", pa.float64())]
    )
    with pq.ParquetWriter(target, schema) as writer:
        for rows in _pieces(source):
            for row in rows:
                row["prompt"] = [_fitted(message, types) for message in row["prompt"]]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def _types(source: Path) -> dict[str, Any]:
    """Find a type for each key of the prompts' messages; text for those that have none."""
    import pyarrow as pa

    found: dict[str, Any] = {}
    odd: set[str] = set()
    for rows in _pieces(source):
        values: dict[str, list[Any]] = {}
        for row in rows:
            for message in row["prompt"]:
                for key in message.keys() - set(_PLAIN) - odd:
                    values.setdefault(key, []).append(message[key])
        for key, given in values.items():
            try:
                schemas = [pa.schema([(key, kind)]) for kind in (found.get(key), pa.array(given).type) if kind]
                found[key] = pa.unify_schemas(schemas, promote_options="permissive").field(key).type
            except (pa.ArrowException, OverflowError):
                odd.add(key)
    return {
        key: pa.string() if key in odd or not _holds(found[key]) else found[key] for key in sorted(odd | set(found))
    }


def _holds(kind: Any) -> bool:
    """Say whether Parquet can hold a type: none of its objects is without keys, none of its values without a type."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return kind.num_fields > 0 and all(_holds(kind.field(at).type) for at in range(kind.num_fields))
    return _holds(kind.value_type) if pa.types.is_list(kind) else not pa.types.is_null(kind)


def _fitted(message: Mapping[str, Any], types: Mapping[str, Any]) -> dict[str, Any]:
    import pyarrow as pa

    return {
        key: json.dumps(value, ensure_ascii=False)
        if types.get(key) == pa.string() and value is not None and not isinstance(value, str)
        else value
        for key, value in message.items()
    }


def _pieces(path: Path) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            rows.append(json.loads(line))
            if len(rows) == _CHUNK:
                yield rows
                rows = []
    if rows:
        yield rows
