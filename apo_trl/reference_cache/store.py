"""The SQLite file of one reference: a row per pair, each with a checksum.

It uses a rollback journal: a write-ahead log does not work on network file systems.
"""

import hashlib
import math
import sqlite3
import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger

from apo_trl.errors import InputError

__all__ = ["Logps", "ReferenceStore", "unusable"]

logger = get_logger(__name__)

_SELECT = "SELECT chosen, rejected, checksum FROM pairs WHERE key = ?"

Logps = tuple[float, float]
"""The reference's log-probs of a pair: of the chosen and of the rejected completion."""


class ReferenceStore:
    """The log-probs of one reference, by the key of their pair.

    SQLite checks the file's structure when it is opened, and every row has a checksum. A damaged file is renamed to
    `NAME.damaged-1`, with a warning, and a new one is created. Raises InputError if that is not possible.
    """

    _file: sqlite3.Connection
    _inode: int  # changes if another process has renamed the file

    def __init__(self, path: Path) -> None:
        self.path = path
        self._full = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connect()
        except (OSError, sqlite3.Error) as error:
            raise unusable(path.parent, error) from None

    def read(self, keys: Iterable[bytes]) -> dict[bytes, Logps]:
        """Return the values of those keys that are stored."""
        values = {}
        try:
            for key in set(keys):
                for chosen, rejected, checksum in self._file.execute(_SELECT, (key,)):
                    if checksum != _checksum(key, (chosen, rejected)):
                        raise sqlite3.DatabaseError("a row does not match its checksum")
                    values[key] = (chosen, rejected)
        except sqlite3.Error as error:
            try:
                self._set_aside(error)
            except (OSError, sqlite3.Error) as fault:
                raise unusable(self.path.parent, fault) from None
            return {}
        return values

    def write(self, values: Mapping[bytes, Logps]) -> None:
        """Add values in one transaction, except those that are not finite.

        A full disk does not stop the run, which has the values in memory: it warns, and no longer writes.
        """
        if self._full:
            return
        rows = [(key, *logps, _checksum(key, logps)) for key, logps in values.items() if all(map(math.isfinite, logps))]
        try:
            with self._file:
                self._file.executemany("INSERT OR IGNORE INTO pairs VALUES (?, ?, ?, ?)", rows)
        except sqlite3.Error as error:
            self._full = True
            logger.warning(
                f"Reference log-probs are no longer written to {self.path}: {error}. Training continues without."
            )

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _connect(self) -> None:
        self._file = sqlite3.connect(self.path, timeout=60)
        self._inode = self.path.stat().st_ino
        try:
            fault = self._file.execute("PRAGMA integrity_check(1)").fetchone()[0]
            if fault != "ok":
                raise sqlite3.DatabaseError(fault)
            self._file.execute(
                "CREATE TABLE IF NOT EXISTS pairs "
                "(key BLOB PRIMARY KEY, chosen REAL, rejected REAL, checksum BLOB) WITHOUT ROWID"
            )
        except sqlite3.DatabaseError as error:
            self._set_aside(error)

    def _set_aside(self, error: sqlite3.Error) -> None:
        """Rename a damaged file and create a new one; raise errors of other kinds again."""
        self._file.close()
        if isinstance(error, sqlite3.OperationalError) and error.sqlite_errorname != "SQLITE_ERROR":
            raise error
        with suppress(FileNotFoundError):  # another process has renamed it
            if self.path.stat().st_ino == self._inode:
                aside = self._rename()
                logger.warning(
                    f"The cache of reference log-probs {self.path} is damaged ({error}). It was renamed to {aside}, "
                    "and its log-probs are computed again."
                )
        self._connect()

    def _rename(self) -> str:
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.damaged-{number}")).exists():
            number += 1
        self.path.replace(aside)
        with suppress(FileNotFoundError):  # a journal left behind would be applied to the new file
            self.path.with_name(f"{self.path.name}-journal").replace(aside.with_name(f"{aside.name}-journal"))
        return aside.name


def _checksum(key: bytes, logps: Iterable[Any]) -> bytes:
    try:
        packed = struct.pack("<dd", *(value + 0.0 for value in logps))  # SQLite has no -0.0
    except (struct.error, TypeError):
        packed = b""  # not two numbers: matches nothing
    return hashlib.sha256(key + packed).digest()[:8]


def unusable(folder: Path, error: Exception) -> InputError:
    """Return the error for a folder that cannot hold the log-probs."""
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return InputError(f"ref_cache_dir: cannot write to {folder} ({reason}). Set it to a folder that can be written.")
