"""Start the training script under `accelerate launch`."""

import signal
import sys
from collections.abc import Sequence

from apo_trl.errors import InputError
from apo_trl.io.resources import accelerate_config
from apo_trl.training.arguments import parse, with_recipe
from apo_trl.training.screen import exit_on_error, quiet_libraries

__all__ = ["launch"]


def launch(arguments: Sequence[str]) -> None:
    """Start this script under `accelerate launch`, after reading its arguments where an error is still one line.

    The script gets all of them, and passes over those of the launcher.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    quiet_libraries()
    with exit_on_error():
        arguments = with_recipe(arguments)
        _, launcher = parse(arguments)
        if "--accelerate_config" in launcher[:-1]:
            at = launcher.index("--accelerate_config") + 1
            launcher[at] = accelerate_config(launcher[at])
        try:
            launcher = resolve_accelerate_config_argument(launcher)
        except ValueError as error:
            raise InputError(str(error)) from error
    # --quiet: the script has said what went wrong; accelerate would add a traceback of its own.
    launched = launch_command_parser().parse_args(["--quiet", *launcher, "--module", "apo_trl.train", *arguments])
    try:
        launch_command(launched)
    except (KeyboardInterrupt, SignalException) as error:  # the script has said how to go on
        sys.exit(128 + getattr(error, "sigval", signal.SIGINT))
