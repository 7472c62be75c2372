"""Every reply, raw as it came, in one SQLite file: what has been paid for is never asked again.

A reply is found by a key made of all that determines it. Which row asked is noted beside it and is no part of the
key: two rows that ask the same get the same. Not the method either, but the step (sample, revise, compare, score): a
policy's answers stay its answers when the method changes.
"""

import contextlib
import hashlib
import json
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from apo_trl.errors import InputError

__all__ = ["ResponseCache", "open_read_only", "reply_key"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS replies (
    key TEXT PRIMARY KEY, role TEXT, step TEXT, row TEXT, sample INTEGER, model TEXT, body TEXT,
    requests INTEGER, prompt_tokens INTEGER, completion_tokens INTEGER, cost REAL, at REAL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS errors (key TEXT PRIMARY KEY, role TEXT, row TEXT, message TEXT, at REAL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS exported (
    key TEXT PRIMARY KEY, role TEXT, step TEXT, row TEXT, sample INTEGER, model TEXT
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS servers (key TEXT PRIMARY KEY, honours TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS rows (
    position INTEGER PRIMARY KEY, id TEXT, reason TEXT, detail TEXT, pair TEXT, notes TEXT
);
"""


def reply_key(**parts: Any) -> str:
    """Give the SHA-256 in hex of what determines a reply: step, template, messages, model, URL, parameters, sample."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class ResponseCache:
    """The file `store.sqlite` of one output folder, with one process at a time as its writer.

    Every write is its own transaction in a write-ahead log: a killed process loses none that was done.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"output_dir: {folder} cannot be made: {error.strerror}.") from error
        self.path = folder / "store.sqlite"
        self._lock = FileLock(str(folder / "store.lock"), blocking=False)
        try:
            self._lock.acquire()
        except Timeout:
            raise InputError(
                f"output_dir: another run is writing to {folder}; wait for it, or choose another folder."
            ) from None
        except OSError as error:
            raise InputError(f"output_dir: {folder} cannot be written to: {error.strerror}.") from error
        try:
            self._base = sqlite3.connect(self.path, isolation_level=None)
        except sqlite3.Error as error:
            self._lock.release()
            raise InputError(f"{self.path} cannot be opened ({error}); move it away.") from error
        try:
            self._base.execute("PRAGMA journal_mode=WAL")
            self._base.execute("PRAGMA synchronous=NORMAL")
            self._base.executescript(_SCHEMA)
        except sqlite3.Error as error:
            self.close()
            raise InputError(f"{self.path} is no store of this program ({error}); move it away.") from error

    def close(self) -> None:
        """Fold the log into the file and let others in."""
        self._base.close()
        self._lock.release()

    def __enter__(self) -> "ResponseCache":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, statement: str, values: tuple[Any, ...] = ()) -> None:
        try:
            self._base.execute(statement, values)
        except sqlite3.OperationalError as error:  # the disk is full, for one
            raise InputError(f"{self.path} cannot be written ({error}); what was stored before is safe.") from error

    def reply(self, key: str) -> Any:
        """Give the body of a stored reply, or None."""
        found = self._base.execute("SELECT body FROM replies WHERE key = ?", (key,)).fetchone()
        return json.loads(found[0]) if found else None

    def add(
        self, key: str, body: str, *, role: str, step: str, row: str, sample: int, model: str, requests: int = 1,
        usage: tuple[int, int], cost: float,
    ) -> None:  # fmt: skip
        """Store one reply; `body` is JSON. One that is there already stays: it has been used.

        `requests` is 0 for the second and later answers of one request.
        """
        self._write(
            "INSERT OR IGNORE INTO replies VALUES (?,?,?,?,?,?,?,?,?,?,?,?)",
            (key, role, step, row, sample, model, body, requests, *usage, cost, time.time()),
        )

    def fail(self, key: str, *, role: str, row: str, message: str) -> None:
        """Note that a request failed, for whoever looks for the reason; it is asked again by the next run."""
        self._write("INSERT OR REPLACE INTO errors VALUES (?,?,?,?,?)", (key, role, row, message, time.time()))

    def usage(self) -> dict[str, dict[str, float]]:
        """Say for each role what all runs have had: `requests`, `prompt_tokens`, `completion_tokens`, `cost`."""
        names = ("requests", "prompt_tokens", "completion_tokens", "cost")
        found = self._base.execute(
            f"SELECT role, {', '.join(f'sum({name})' for name in names)} FROM replies GROUP BY role"
        )
        return {role: dict(zip(names, values, strict=True)) for role, *values in found}

    def mean_tokens(self) -> dict[str, float]:
        """Say for each role how many tokens an answer has on average, over all but those to probes."""
        found = self._base.execute(
            "SELECT role, avg(completion_tokens) FROM replies WHERE step != 'probe' GROUP BY role"
        )
        return dict(found.fetchall())

    def honours(self, key: str) -> dict[str, Any] | None:
        """Give what the probe of a server found out, or None."""
        found = self._base.execute("SELECT honours FROM servers WHERE key = ?", (key,)).fetchone()
        return json.loads(found[0]) if found else None

    def set_honours(self, key: str, honours: Mapping[str, Any]) -> None:
        """Note what a server honours, so that it is probed once."""
        self._write("INSERT OR REPLACE INTO servers VALUES (?,?)", (key, json.dumps(honours)))

    def export(self, key: str, *, role: str, step: str, row: str, sample: int, model: str) -> None:
        """Note that a request was written to a batch file, so that its reply can be taken back."""
        self._write("INSERT OR REPLACE INTO exported VALUES (?,?,?,?,?,?)", (key, role, step, row, sample, model))

    def exported(self, key: str) -> dict[str, Any] | None:
        """Give what `export` noted, or None."""
        found = self._base.execute(
            "SELECT role, step, row, sample, model FROM exported WHERE key = ?", (key,)
        ).fetchone()
        return dict(zip(("role", "step", "row", "sample", "model"), found, strict=True)) if found else None

    def take_over(self, other: Path) -> int:
        """Copy the replies of another store in, and say how many were new."""
        before = self._base.total_changes
        try:
            self._base.execute("ATTACH ? AS other", (str(other),))
            self._base.execute("INSERT OR IGNORE INTO replies SELECT * FROM other.replies")
        except sqlite3.Error as error:
            raise InputError(f"The replies of {other} cannot be taken over ({error}); move it away.") from error
        finally:
            with contextlib.suppress(sqlite3.Error):  # where it could not be attached
                self._base.execute("DETACH other")
        return self._base.total_changes - before

    def begin(self) -> None:
        """Forget how the rows ended last time: they are worked out anew from the replies."""
        self._write("DELETE FROM rows")

    def end_row(self, position: int, name: str, *, reason: str, detail: str, pair: str, notes: str) -> None:
        """Note how a row ended: a pair, or the reason for none; `pair` and `notes` are JSON."""
        self._write("INSERT OR REPLACE INTO rows VALUES (?,?,?,?,?,?)", (position, name, reason, detail, pair, notes))

    def rows(self) -> Iterator[tuple[str, str, str, str, str]]:
        """Give `id, reason, detail, pair, notes` of every row, in the order of the prompts."""
        yield from self._base.execute("SELECT id, reason, detail, pair, notes FROM rows ORDER BY position")


@contextlib.contextmanager
def open_read_only(folder: Path) -> Iterator[ResponseCache]:
    """Open the store of a folder as `build` would find it, or an empty one, and leave nothing behind.

    Where there are shards, it is a copy that holds their replies too.
    """
    whole, shards = folder / "store.sqlite", sorted(folder.glob("shards/*/store.sqlite"))
    if whole.is_file() and not shards:
        with ResponseCache(folder) as store:
            yield store
        return
    with tempfile.TemporaryDirectory() as nowhere, ResponseCache(Path(nowhere)) as store:
        for path in [whole, *shards] if whole.is_file() else shards:
            store.take_over(path)
        yield store
