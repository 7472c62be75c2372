"""All responses, as they came, in one SQLite file: nothing that was paid for is requested again.

The key of a response covers what determines it, and not the method, the row or the server: equal requests share one.
"""

import contextlib
import errno
import hashlib
import json
import os
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apo_trl.errors import InputError
from apo_trl.io.disk import write_error
from apo_trl.training.lock import output_lock

__all__ = ["ResponseCache", "open_read_only", "reply_key"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS replies (
    key TEXT PRIMARY KEY, role TEXT, step TEXT, row TEXT, sample INTEGER, model TEXT, body TEXT,
    requests INTEGER, prompt_tokens INTEGER, completion_tokens INTEGER, cost REAL, at REAL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS exported (
    key TEXT PRIMARY KEY, role TEXT, step TEXT, row TEXT, sample INTEGER, model TEXT
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS rows (
    position INTEGER PRIMARY KEY, id TEXT, reason TEXT, detail TEXT, pair TEXT, notes TEXT
);
"""
_DAMAGED = (ArithmeticError, LookupError, RecursionError, TypeError, ValueError,
            sqlite3.InterfaceError, sqlite3.ProgrammingError)  # fmt: skip
_DISK = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY)
_ADD = f"INSERT OR IGNORE INTO replies VALUES (?{',?' * 11})"


def reply_key(**parts: Any) -> str:
    """Compute the SHA-256, in hex, of everything that determines a response."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class ResponseCache(contextlib.ExitStack):
    """The file `store.sqlite` of an output folder, open for one process at a time; a context manager.

    SQLite's write-ahead log does not work on network file systems, and a transaction for each response is slower than
    some servers. So responses are also appended to `store.pending` until `commit`, and a killed process loses none.

    Raises:
        InputError: The folder is in use or not writable, or the file is not a response cache.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / "store.sqlite"
        self._failed = False
        try:
            self.enter_context(output_lock(folder, folder / "store.lock"))
            self._base = self.enter_context(contextlib.closing(sqlite3.connect(self.path, 60, isolation_level=None)))
            self._base.executescript("PRAGMA journal_mode=DELETE;" + _SCHEMA)
            self._pending = self.enter_context(_pending(self.path).open("ab", buffering=0))
            self._replay(self.path)
            self.callback(self._finish)
        except (InputError, OSError, sqlite3.Error) as error:
            self.close()
            raise error if isinstance(error, InputError) else _unusable(self.path, error) from error

    def _write(self, statement: str, *values: Any) -> None:
        try:
            if not self._base.in_transaction:
                self._base.execute("BEGIN")
            if statement == _ADD:
                line = json.dumps(values).encode() + b"\n"
                if self._pending.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._base.execute(statement, values)
        except (sqlite3.Error, OSError) as error:  # a full disk, for example; what is stored is safe
            self._failed = True  # SQLite may have ended the transaction: the next run replays it
            raise _unusable(self.path, error) from error

    def commit(self) -> None:
        """End the transaction that the first write began."""
        if self._base.in_transaction:
            self._write("COMMIT")
            if not self._failed:
                self._pending.truncate(0)

    def _finish(self) -> None:
        self.commit()
        if not self._failed:
            _pending(self.path).unlink(missing_ok=True)

    def _replay(self, path: Path) -> None:
        """Add the responses that a process had not committed when it was killed, or has not yet."""
        self._base.execute("BEGIN")
        if _pending(path).exists():
            for line in _pending(path).read_bytes().splitlines():
                with contextlib.suppress(*_DAMAGED):  # the last line may be cut off
                    values = json.loads(line)
                    json.loads(values[6])  # the body
                    self._base.execute(_ADD, values)
        self.commit()

    def _json(self, statement: str, key: str) -> Any:
        row = self._base.execute(statement, (key,)).fetchone()
        return json.loads(row[0]) if row else None

    def reply(self, key: str) -> Any:
        """Return the body of a cached response, or None."""
        return self._json("SELECT body FROM replies WHERE key = ?", key)

    def add(
        self, key: str, body: str, *, role: str, step: str, row: str, sample: int, model: str, requests: int = 1,
        usage: tuple[int, int], cost: float,
    ) -> None:  # fmt: skip
        """Store a response unless its key has one, which may have been used; one request may have several."""
        values = (key, role, step, row, sample, model, body, requests, *usage, cost, time.time())
        self._write(_ADD, *values)

    def usage(self) -> dict[str, dict[str, float]]:
        """Return `requests`, `prompt_tokens`, `completion_tokens` and `cost` of all runs by role."""
        names = ("requests", "prompt_tokens", "completion_tokens", "cost")
        sums = ", ".join(f"sum({name})" for name in names)
        rows = self._base.execute(f"SELECT role, {sums} FROM replies WHERE step != 'function' GROUP BY role")
        return {role: dict(zip(names, values, strict=True)) for role, *values in rows}

    def results(self, role: str) -> int:
        """Return the number of results of a role's functions, of all runs."""
        count = "SELECT count(*) FROM replies WHERE step = 'function' AND role = ?"
        return int(self._base.execute(count, (role,)).fetchone()[0])

    def mean_tokens(self) -> dict[str, float]:
        """Return the mean tokens of a completion by role, without probes."""
        means = "SELECT role, avg(completion_tokens) FROM replies WHERE step NOT IN ('probe', 'function') GROUP BY role"
        return dict(self._base.execute(means).fetchall())

    def export(self, key: str, *, role: str, step: str, row: str, sample: int, model: str) -> None:
        """Note that a request was written to a batch file, so that its response can be imported."""
        self._write("INSERT OR REPLACE INTO exported VALUES (?,?,?,?,?,?)", key, role, step, row, sample, model)

    def exported(self, key: str) -> Any:
        """Return the keywords of `export` for a request, or None."""
        fields = "json_object('role', role, 'step', step, 'row', row, 'sample', sample, 'model', model)"
        return self._json(f"SELECT {fields} FROM exported WHERE key = ?", key)

    def take_over(self, other: Path) -> int:
        """Copy the responses of another cache file; return how many were new."""
        self.commit()
        before = self._base.total_changes
        self._replay(other)  # first, or what is committed meanwhile would be missing
        try:
            self._base.execute("ATTACH ? AS other", (str(other),))
            self._base.execute("INSERT OR IGNORE INTO replies SELECT * FROM other.replies")
        except sqlite3.Error as error:
            raise _unusable(other, error) from error
        finally:
            with contextlib.suppress(sqlite3.Error):  # if it could not be attached
                self._base.execute("DETACH other")
        return self._base.total_changes - before

    def begin(self) -> None:
        """Delete how the rows ended last time. Every run computes it from the responses."""
        self._write("DELETE FROM rows")

    def end_row(self, position: int, name: str, *, reason: str, detail: str, pair: str, notes: str) -> None:
        """Note how a row ended: with a pair or a reason; `pair` and `notes` are JSON."""
        self._write("INSERT OR REPLACE INTO rows VALUES (?,?,?,?,?,?)", position, name, reason, detail, pair, notes)

    def rows(self) -> Iterator[tuple[str, str, str, str, str]]:
        """Yield `id, reason, detail, pair, notes` of every row, in the order of the prompts."""
        yield from self._base.execute("SELECT id, reason, detail, pair, notes FROM rows ORDER BY position")


def _pending(path: Path) -> Path:
    return path.with_suffix(".pending")


def _unusable(path: Path, error: sqlite3.Error | OSError) -> InputError:
    """Return the error of a full or read-only disk, which loses nothing, or of a file that is not a cache."""
    if isinstance(error, OSError) or getattr(error, "sqlite_errorcode", 0) & 0xFF in _DISK:
        return InputError(f"output_dir: {write_error(path, getattr(error, 'strerror', None) or str(error))}")
    return InputError(f"output_dir: {path} is not a response cache ({error}). Move it out of the folder.")


@contextlib.contextmanager
def open_read_only(folder: Path) -> Iterator[ResponseCache]:
    """Open the cache of a folder as `build` would find it, with the responses of its shards, and leave no new file."""
    paths = [*folder.glob("store.sqlite"), *sorted(folder.glob("shards/*/store.sqlite"))]
    in_place = paths == [folder / "store.sqlite"] and os.access(folder, os.W_OK)
    with tempfile.TemporaryDirectory() as empty, ResponseCache(folder if in_place else Path(empty)) as store:
        for path in () if in_place else paths:
            store.take_over(path)
        yield store
