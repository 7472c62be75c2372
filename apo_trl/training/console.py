"""What a command prints besides its result, and how it ends: quiet libraries, our log, one line after an error."""

import contextlib
import logging
import os
import select
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from apo_trl.errors import InputError
from apo_trl.io.disk import full_disk_error

__all__ = [
    "TRACEBACK",
    "enable_info_log",
    "exit_on_error",
    "ignore_signals",
    "is_local_main_process",
    "quiet_libraries",
]

TRACEBACK = "APO_TRL_TRACEBACK"  # set by `--traceback`, for started processes too
_SIGNALS: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def is_local_main_process() -> bool:
    """Return whether this process prints for all processes of its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def quiet_libraries() -> None:
    """Silence what libraries print of themselves; call it before they are imported, and after `choose_threads`.

    Their progress bars appear if something takes seconds. Silenced are DeepSpeed without an accelerator, bitsandbytes
    on a CPU, the defaults of `accelerate launch`, and deprecations of TRL's own defaults.
    """
    seconds = {"DELAY": "2"} if sys.stderr.isatty() else {"DELAY": "2", "MININTERVAL": "30", "MAXINTERVAL": "30"}
    for option, value in seconds.items():
        os.environ.setdefault(f"TQDM_{option}", value)
    import torch

    if not getattr(torch, "accelerator", torch.cuda).is_available():  # older torch has only torch.cuda
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("accelerate.commands.launch").addFilter(_is_no_list_of_defaults)
    warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing.* is deprecated", FutureWarning)


def _is_no_list_of_defaults(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("The following values were not passed to `accelerate launch`")


def enable_info_log() -> None:
    """Print what this package logs at level INFO, in the first process of each machine."""
    if is_local_main_process():
        logging.basicConfig(format="%(message)s")
        logging.getLogger("apo_trl").setLevel(logging.INFO)


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Exit with one line per machine instead of a traceback, after a `StreamError` with one per process.

    The status is 2 after an InputError, 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP (a closed terminal), and
    141 if the program that reads the output has ended, such as `head`.
    """
    with _interrupt_on_signals() as received:
        try:
            yield
            sys.stdout.flush()  # or a closed pipe is found when Python ends, with a traceback
        except InputError as error:
            _exit(2, f"error: {error}", everywhere=getattr(error, "everywhere", False))
        except BrokenPipeError:
            if not (closed := _closed_outputs()):
                raise  # it was another pipe or a socket
            for output in closed:
                os.dup2(os.open(os.devnull, os.O_WRONLY), output)  # Python flushes it at the end
            _exit(128 + signal.SIGPIPE)
        except OSError as error:
            if not (problem := full_disk_error(Path(), error)):
                raise
            _exit(2, f"error: {problem}")
        except KeyboardInterrupt as error:
            ignore_signals()
            _exit(128 + (received or [signal.SIGINT])[-1], f"\nInterrupted.{error}")


def _closed_outputs() -> list[int]:
    """Return which of standard output and standard error are pipes that nobody reads any more."""
    poll = select.poll()
    for output in (1, 2):
        poll.register(output, 0)
    return [output for output, event in poll.poll(0) if event & select.POLLERR]


def ignore_signals() -> None:
    """Ignore further signals while this process prints how to resume: `timeout` and torch's launcher send two."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def _interrupt_on_signals() -> Iterator[list[int]]:
    """Let SIGTERM and SIGHUP do what Ctrl-C does, unless they are ignored, and yield a list of those received."""
    process, received, before = os.getpid(), list[int](), dict[int, Any]()

    def interrupt(number: int, frame: Any) -> None:
        if os.getpid() != process:  # a forked worker, of a data loader for example
            os._exit(128 + number)
        received.append(number)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error for a data loader that ends
        on_interrupt = signal.getsignal(signal.SIGINT)  # asyncio's, in `pairs build`
        if not callable(on_interrupt):
            raise KeyboardInterrupt  # SIGINT is ignored, as in a background job of a script
        on_interrupt(number, frame)

    # Only the first process of a machine prints. The others end at once, whatever they wait for.
    if is_local_main_process() and threading.current_thread() is threading.main_thread():
        for number in _SIGNALS[1:]:
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, interrupt)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit(status: int, message: str = "", *, everywhere: bool = False) -> NoReturn:
    if message and (everywhere or is_local_main_process()):
        with contextlib.suppress(OSError):  # the terminal is gone
            if os.environ.get(TRACEBACK):
                traceback.print_exc()
            print(message, file=sys.stderr)
    torch = sys.modules.get("torch")
    if status > 128 and torch is not None and torch.distributed.is_initialized():
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)  # the usual way out can wait for a tensor of a process that has ended
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends at once
    sys.exit(status)
