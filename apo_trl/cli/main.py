"""The command `apo-trl`: build the parser of all commands, parse, run."""

import os
import sys
from collections.abc import Sequence

from apo_trl import __version__
from apo_trl.cli import anchor, bench, compare, demo, evaluate, merge, pairs, recipes, report, rounds, run, score, train
from apo_trl.cli.options import Parser
from apo_trl.training.console import TRACEBACK, exit_on_error

__all__ = ["build_parser", "main"]

_COMMANDS = (train, run, recipes, pairs, rounds, anchor, evaluate, compare, score, report, merge, bench, demo)


def build_parser() -> Parser:
    description = "Anchored Preference Optimization (APO) for Hugging Face TRL."
    parser = Parser(prog="apo-trl", description=description, epilog="example:\n  apo-trl demo")
    parser.add_argument("--version", action="version", version=__version__, help="print the version and stop")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for module in _COMMANDS:
        module.add(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = build_parser()
    options = vars(parser.parse_args(arguments))
    if options.pop("traceback", False):
        os.environ[TRACEBACK] = "1"
    if "run" not in options:
        parser.print_help()
        sys.exit(2)
    with exit_on_error():
        options.pop("run")(**options)


if __name__ == "__main__":
    main()
