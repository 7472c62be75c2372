"""Start the training script under `accelerate launch`, and end it with its launcher.

One process replaces the launcher, so that signals and the exit status are its own. Several are started by torch, which
forwards signals to them.
"""

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from apo_trl.errors import InputError
from apo_trl.io.resources import accelerate_config
from apo_trl.training.arguments import check_paths, parse, with_recipe
from apo_trl.training.console import quiet_libraries
from apo_trl.training.threads import choose_threads

__all__ = ["end_with_launcher", "launch"]


def launch(arguments: Sequence[str]) -> None:
    """Check the arguments, as `parse` does, and start the training script, which skips those of the launcher."""
    choose_threads()
    arguments = with_recipe(arguments)
    check_paths(arguments)  # before imports that take seconds
    from accelerate.commands import launch as accelerate
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    quiet_libraries()
    _, launcher = parse(arguments)
    if "--accelerate_config" in launcher[:-1]:
        index = launcher.index("--accelerate_config") + 1
        launcher[index] = accelerate_config(launcher[index])
    try:
        launcher = resolve_accelerate_config_argument(launcher)
    except ValueError as error:
        raise InputError(str(error)) from error
    # --quiet: the script has printed its error; accelerate would add a traceback of its own.
    parser = accelerate.launch_command_parser()
    options = parser.parse_args(["--quiet", *launcher, "--module", "apo_trl.train", *arguments])
    options.signals_to_handle = "SIGQUIT"  # torch's own handlers would undo `nohup`, and a second Ctrl-C would wait

    def forward(number: int, _: Any) -> NoReturn:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends at once, and the processes with it
        logging.disable(logging.WARNING)  # torch would say which signals it sends
        raise SignalException("", signal.Signals(number))

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, forward)
    accelerate.simple_launcher = _replace_process
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it would print them all again
    try:
        accelerate.launch_command(options)
    except SignalException as error:  # the script has printed how to resume
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:  # it has printed its error
        _, failure = error.get_first_failure()
        if failure.exitcode < 0:  # of a full memory, for example
            print(
                f"error: process {failure.pid} was ended by {signal.Signals(-failure.exitcode).name}.", file=sys.stderr
            )
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)


def _replace_process(options: Any) -> NoReturn:
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    command, environment = prepare_simple_launcher_cmd_env(options)
    sys.stdout.flush()
    os.execvpe(command[0], command, environment)


def end_with_launcher() -> None:
    """Let Linux end this process when torch's launcher ends, which SIGKILL keeps from forwarding anything."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
