"""Files that are whole or not there."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from apo_trl.errors import InputError

__all__ = ["atomic_write", "write_json"]


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a name beside a file's place, and put there what was written under it, or leave the old one.

    Raises InputError where the disk does not take it.
    """
    beside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        os.replace(beside, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error}); what was there is safe.") from error
    finally:
        with suppress(OSError):  # a parent that is a file
            beside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a report as indented JSON; half of a surrogate pair, which UTF-8 cannot hold, becomes "?"."""
    with atomic_write(path) as beside:
        beside.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8", errors="replace")
