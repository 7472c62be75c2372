"""A lock on an output folder: two runs that write to the same files would mix their checkpoints."""

import contextlib
import errno
import fcntl
import os
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path

from apo_trl.errors import InputError

__all__ = ["hidden_file", "output_lock"]


def hidden_file(folder: str | Path, name: str) -> Path:
    """Return the path of a file of ours in an output folder that no upload to the hub includes."""
    return Path(folder, ".cache", "huggingface", name)


@contextlib.contextmanager
def output_lock(folder: str | Path, path: Path | None = None) -> Iterator[None]:
    """Lock an output folder until the context or this process ends, however it ends.

    Args:
        folder: The output folder, as messages name it.
        path: The lock file, which stays (default: a hidden file in the folder).

    Raises:
        InputError: Another process holds the lock, or the folder is not writable.
    """
    path = path or hidden_file(folder, "apo-trl.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = [os.open(path, os.O_RDWR | os.O_CREAT, 0o666)]
    except OSError as error:
        raise InputError(f"output_dir: {folder}: {error.strerror}. Set a writable folder.") from error

    def release() -> None:
        while held:
            os.close(held.pop())

    os.register_at_fork(after_in_child=release)  # or the workers of a data loader would hold it, too
    try:
        fcntl.flock(held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:
            owner = os.read(held[0], 100).decode()
            release()
            raise InputError(
                f"output_dir: another run is writing to {folder} ({owner}). End it, wait, or set another folder."
            ) from None
        warnings.warn(f"output_dir: {folder} cannot be locked ({error.strerror}). Start one run there.", stacklevel=3)
    with contextlib.suppress(OSError):  # of a full disk, which those who write more will report
        os.truncate(held[0], 0)
        os.write(held[0], f"process {os.getpid()} on {platform.node()}".encode())
    try:
        yield
    finally:
        release()
