"""The error of a write that failed: the path, the cause, and the free space."""

import errno
import os
import re
import shutil
from pathlib import Path

from apo_trl.errors import InputError

__all__ = ["full_disk_error", "write_error"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def write_error(path: Path, reason: str) -> InputError:
    """Return the error of a path that cannot be written, with the free space of its disk."""
    folder = next((folder for folder in (path, *path.absolute().parents) if folder.exists()), path.absolute().parent)
    free = shutil.disk_usage(folder).free / 1e6
    remedy = f"Free space or change the path; its disk has {free:,.0f} MB free. Then run the same command again."
    return InputError(f"{path}: cannot be written ({reason}). {remedy}")


def full_disk_error(path: Path, error: BaseException) -> InputError | None:
    """Return the error of a disk that is full, over its quota or read-only, or None if that is not the cause.

    Args:
        path: What was written, if the error does not name it.
        error: An OSError, or what safetensors, tokenizers or torch raise in its place.
    """
    number = getattr(error, "errno", None)
    if match := re.search(r"\(os error (\d+)\)", str(error)):  # of Rust
        number = int(match[1])
    elif re.search(r"inline_container|PytorchStreamWriter", str(error)):  # torch.save drops the cause
        number = errno.ENOSPC
    if number not in _FULL:
        return None
    named = getattr(error, "filename", None)
    return write_error(Path(named) if isinstance(named, str) else path, os.strerror(number))
