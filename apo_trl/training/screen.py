"""Keep the screen for what a command has to say."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import NoReturn

from apo_trl.errors import InputError
from apo_trl.training.checkpoints import is_local_main_process

__all__ = ["enable_info_log", "exit_on_error", "quiet_libraries"]


def quiet_libraries() -> None:
    """Silence what the host's parts say of themselves where nobody asked; to be called before they are imported.

    DeepSpeed tells that there is no accelerator, bitsandbytes that it has no fast kernels for a CPU, and TRL's own
    defaults are deprecated in transformers.
    """
    import torch

    if not getattr(torch, "accelerator", torch.cuda).is_available():  # older torch has only the latter
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def enable_info_log() -> None:
    """Print what this package logs at level INFO, in the first process of each machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        logging.basicConfig(format="%(message)s")
        logging.getLogger("apo_trl").setLevel(logging.INFO)


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Turn an InputError into one line on the first process of a machine and status 2 on all, Ctrl-C into 130."""
    try:
        yield
    except InputError as error:
        if is_local_main_process():
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        if is_local_main_process():
            print(f"\nInterrupted.{error}", file=sys.stderr)
        _leave(130)


def _leave(status: int) -> NoReturn:
    """Exit; at once where processes exchange tensors, as the way out can wait for one of a process that has gone."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
