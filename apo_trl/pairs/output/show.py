"""The raw replies behind the rows of a run, read from its folder alone."""

import contextlib
import json
import re
import sqlite3
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apo_trl.errors import InputError, nearest
from apo_trl.io.files import read_json
from apo_trl.pairs.llm.reply import choices_of
from apo_trl.pairs.text.reasons import REASONS

__all__ = ["show"]

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a terminal would obey them


def show(path: str, reason: str | None = None, limit: int = 5) -> Iterator[str]:
    """Yield, as text, the first rows that ended for a reason ("kept" is one), or the counts of all reasons.

    Raises:
        InputError: The path has no response cache, or no row ended for this reason.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    store = (folder / "store.sqlite").resolve()
    if not store.is_file():
        raise InputError(f"{path}: no store.sqlite there. Name the output_dir of `apo-trl pairs build`, or its report.")
    try:
        with contextlib.closing(sqlite3.connect(f"{store.as_uri()}?mode=ro", uri=True)) as base:
            yield from _counts(base) if reason is None else _rows(base, _where(base, folder, reason), limit)
    except sqlite3.Error as error:
        raise InputError(f"{store}: cannot be read ({error}). Run `apo-trl pairs build` again, and wait.") from error


def _counts(base: sqlite3.Connection) -> Iterator[str]:
    for name, count in base.execute("SELECT reason, count(*) FROM rows GROUP BY reason ORDER BY count(*) DESC"):
        yield f"{count:>7,} {name or 'kept':<28}{REASONS.get(name, ('',))[0]}".rstrip()
    yield "Add --reason NAME to read the replies of its rows."


def _where(base: sqlite3.Connection, folder: Path, reason: str) -> tuple[str, tuple[str, ...]]:
    """Return the condition of rows, and its values. A pair that training would lose is a row without a reason."""
    known = [name or "kept" for (name,) in base.execute("SELECT DISTINCT reason FROM rows")]
    if reason in known:
        return "reason = ?", ("" if reason == "kept" else reason,)
    lost = (read_json(folder / "report.json") or {}).get("examples", {})
    if reason in lost:
        return f"id IN (?{',?' * (len(lost[reason]) - 1)})", tuple(example["id"] for example in lost[reason])
    known += [name for name in lost if name not in known]
    raise InputError(f"--reason: '{reason}' not found.{nearest(reason, known)} Set one of {', '.join(known)}.")


def _rows(base: sqlite3.Connection, where: tuple[str, tuple[str, ...]], limit: int) -> Iterator[str]:
    condition, values = where
    rows = base.execute(f"SELECT id, reason, detail, notes FROM rows WHERE {condition} ORDER BY position", values)
    for name, reason, detail, text in rows.fetchmany(limit):
        notes = json.loads(text)
        first_line = str(notes.get("prompt", "")).partition("\n")[0]
        yield f"{name}: {reason or 'kept'}{detail and f': {detail}'}"
        yield f"  prompt: {_CONTROL.sub('', first_line)}"
        for key in notes.get("replies", ()):
            for role, model, body in base.execute("SELECT role, model, body FROM replies WHERE key = ?", (key,)):
                yield f"  {role} ({model}):\n{textwrap.indent(_raw(json.loads(body)), '    | ', lambda line: True)}"
        if not notes.get("replies"):
            yield "  no reply in the cache"
        yield ""


def _raw(body: Any) -> str:
    if isinstance(body, list):  # of a function
        body = {"choices": [{"message": {"content": str(body[0])}, "finish_reason": "stop"}]}
    choice, *_ = [*choices_of(body), {}]
    content = choice.get("message", {}).get("content")
    plain = isinstance(content, str) and choice.get("finish_reason") == "stop"
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(content) if plain else json.dumps(choice or body, indent=2))
