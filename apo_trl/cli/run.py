"""`apo-trl run`."""

import argparse
from typing import Any

from apo_trl.cli.options import add_command


def add(commands: Any) -> None:
    help, example = "run a TRL script with the losses registered", "my_dpo.py --loss_type apo_zero_norm"
    parser = add_command(commands, "run", run, help, example)
    parser.add_argument("script", metavar="SCRIPT", help="path of a Python file")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the script")


def run(script: str, arguments: list[str]) -> None:
    from apo_trl.run import main

    main([script, *arguments])
