"""What a command prints besides its result, and how it ends: quiet libraries, our log, one line after an error."""

import contextlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator

from apo_trl.errors import InputError

__all__ = ["TRACEBACK", "enable_info_log", "exit_on_error", "is_local_main_process", "quiet_libraries"]

TRACEBACK = "APO_TRL_TRACEBACK"  # set by `--traceback`, for started processes too


def is_local_main_process() -> bool:
    """Return whether this process prints for all processes of its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def quiet_libraries() -> None:
    """Silence DeepSpeed without an accelerator, bitsandbytes on a CPU, and deprecations of TRL's own defaults.

    Call it before these libraries are imported.
    """
    import torch

    if not getattr(torch, "accelerator", torch.cuda).is_available():  # older torch has only torch.cuda
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def enable_info_log() -> None:
    """Print what this package logs at level INFO, in the first process of each machine."""
    if is_local_main_process():
        logging.basicConfig(format="%(message)s")
        logging.getLogger("apo_trl").setLevel(logging.INFO)


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Exit with status 2 after an InputError and 130 after Ctrl-C, with one line per machine instead of a traceback."""
    try:
        yield
    except InputError as error:
        _print(f"error: {error}")
        sys.exit(2)
    except KeyboardInterrupt as error:
        _print(f"\nInterrupted.{error}")
        torch = sys.modules.get("torch")
        if torch is not None and torch.distributed.is_initialized():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(130)  # the usual way out can wait for a tensor of a process that has ended
        sys.exit(130)


def _print(message: str) -> None:
    if is_local_main_process():
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        print(message, file=sys.stderr)
