"""One file of reference log-probs: SQLite, a row for each pair, each with a checksum; what is damaged is set aside."""

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

Logps = tuple[float, float]
"""The reference's log-probs of a pair: of the chosen and of the rejected completion."""


class ReferenceStore:
    """The log-probs of one reference in one file, by the key of their pair.

    What is read was written whole: SQLite checks the file's structure when it is opened, and every row carries a
    checksum. A file that fails either is renamed to `NAME.damaged-1`, with a warning, and a new one begun. Raises
    InputError where the file cannot be opened or written.
    """

    _file: sqlite3.Connection
    _number: int  # of the file in its folder, which tells whether another process has renamed it

    def __init__(self, path: Path) -> None:
        self.path = path
        self._full = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connect()
        except (OSError, sqlite3.Error) as error:
            raise unusable(path.parent, error) from None

    def read(self, keys: Iterable[bytes]) -> dict[bytes, Logps]:
        """Give the values of those keys that are there."""
        found = {}
        try:
            for key in set(keys):
                row = self._file.execute(
                    "SELECT chosen, rejected, checksum FROM pairs WHERE key = ?", (key,)
                ).fetchone()
                if row is not None:
                    if row[2] != _checksum(key, row[:2]):
                        raise sqlite3.DatabaseError("a row does not match its checksum")
                    found[key] = (row[0], row[1])
        except sqlite3.Error as error:
            try:
                self._set_aside(error)
            except (OSError, sqlite3.Error) as fault:
                raise unusable(self.path.parent, fault) from None
            return {}
        return found

    def write(self, values: Mapping[bytes, Logps]) -> None:
        """Add values at once; those that are not finite are left out, as they are a fault and no measurement.

        A full disk does not end a run that has the values in memory: there is a warning, and nothing more is written.
        """
        rows = [(key, *logps, _checksum(key, logps)) for key, logps in values.items() if all(map(math.isfinite, logps))]
        if self._full:
            return
        try:
            with self._file:
                self._file.executemany("INSERT OR IGNORE INTO pairs VALUES (?, ?, ?, ?)", rows)
        except sqlite3.Error as error:
            self._full = True
            logger.warning(
                f"Reference log-probs are no longer written to {self.path}: {error}. The run goes on without."
            )

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _connect(self) -> None:
        self._file = sqlite3.connect(self.path, timeout=60)
        self._number = self.path.stat().st_ino
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
        """Rename a damaged file and begin a new one; raise the error again where it is none of damage."""
        self._file.close()
        if isinstance(error, sqlite3.OperationalError) and error.sqlite_errorname != "SQLITE_ERROR":
            raise error
        with suppress(FileNotFoundError):  # another process has just renamed it
            if self.path.stat().st_ino == self._number:
                aside = self._rename()
                logger.warning(
                    f"The cache of reference log-probs {self.path} is damaged ({error}); it was renamed to {aside}, "
                    "and its log-probs are computed again."
                )
        self._connect()

    def _rename(self) -> str:
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.damaged-{number}")).exists():
            number += 1
        self.path.replace(aside)
        with suppress(FileNotFoundError):  # a journal left behind would be played into the new file
            self.path.with_name(f"{self.path.name}-journal").replace(aside.with_name(f"{aside.name}-journal"))
        return aside.name


def _checksum(key: bytes, logps: Iterable[Any]) -> bytes:
    try:
        packed = struct.pack("<dd", *(value + 0.0 for value in logps))  # SQLite has no -0.0
    except (struct.error, TypeError):
        packed = b""  # no pair of numbers: matches nothing
    return hashlib.sha256(key + packed).digest()[:8]


def unusable(folder: Path, error: Exception) -> InputError:
    """Say that a folder cannot hold the log-probs, and why."""
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return InputError(
        f"The reference log-probs cannot be stored in {folder} ({reason}); set ref_cache_dir to a folder that can be "
        "written."
    )
