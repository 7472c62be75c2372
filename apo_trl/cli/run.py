"""`apo-trl run`."""

from typing import Any

from apo_trl.cli.options import add_command
from apo_trl.run import add_arguments


def add(commands: Any) -> None:
    help, example = "run a TRL script with the losses registered", "my_dpo.py --loss_type apo_zero_norm"
    files = "the script, and what it reads; a local file, too, in its load_dataset", "what the script writes"
    add_arguments(add_command(commands, "run", run, help, example, *files))


def run(**options: Any) -> None:
    from apo_trl.run import run_script

    run_script(**options)
