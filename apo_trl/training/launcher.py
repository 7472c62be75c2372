"""Start the training script under `accelerate launch`."""

import signal
import sys
from collections.abc import Sequence

from apo_trl.errors import InputError
from apo_trl.io.resources import accelerate_config
from apo_trl.training.arguments import parse, with_recipe
from apo_trl.training.console import quiet_libraries

__all__ = ["launch"]


def launch(arguments: Sequence[str]) -> None:
    """Check the arguments, as `parse` does, and start the training script, which skips those of the launcher."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    quiet_libraries()
    arguments = with_recipe(arguments)
    _, launcher = parse(arguments)
    if "--accelerate_config" in launcher[:-1]:
        index = launcher.index("--accelerate_config") + 1
        launcher[index] = accelerate_config(launcher[index])
    try:
        launcher = resolve_accelerate_config_argument(launcher)
    except ValueError as error:
        raise InputError(str(error)) from error
    # --quiet: the script has printed its error; accelerate would add a traceback of its own.
    options = launch_command_parser().parse_args(["--quiet", *launcher, "--module", "apo_trl.train", *arguments])
    try:
        launch_command(options)
    except (KeyboardInterrupt, SignalException) as error:  # the script has printed how to resume
        sys.exit(128 + getattr(error, "sigval", signal.SIGINT))
