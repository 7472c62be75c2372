"""What all commands share: their parser, and the types of their options."""

import argparse
import sys
from functools import partial
from typing import Any, NoReturn

from apo_trl.errors import nearest
from apo_trl.pairs.config.settings import known_keys, unknown_key

__all__ = ["JUDGE", "MODEL", "OUTPUT", "PROMPTS", "Parser", "add_command", "answering_keys", "exit_if_stopped"]
__all__ += ["positive_int", "stopped_line"]

MODEL = "model or adapter: a folder, a hub name, or a name at --{}_base_url"
JUDGE = "model that judges; or set --judge_function"
PROMPTS = "prompts, as for `apo-trl pairs build`"
OUTPUT = "folder of results and cache; the same command resumes (default: {})"


class Parser(argparse.ArgumentParser):
    """A parser with errors of one line, which repeat no unknown argument: it may be an API key."""

    keeps_rest = False  # unknown arguments, in the option `rest`

    def __init__(self, **settings: Any) -> None:
        formatter = partial(argparse.RawDescriptionHelpFormatter, max_help_position=30)
        super().__init__(allow_abbrev=False, formatter_class=formatter, **settings)
        self.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS, help="show the whole error")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # noqa: D102
        options, rest = super().parse_known_args(args, namespace)
        if self.keeps_rest:
            options.rest = rest
        elif rest:
            option, known = rest[0].split("=")[0], self._option_string_actions
            if not option.startswith("--"):
                self.error("one argument too many")
            if "api_key" in option and "--policy_api_key_env" in known:
                self.error(unknown_key(option[2:], known))
            self.error(f"{option}: unknown option.{nearest(option, known)}")
        return options, []

    def error(self, message: str) -> NoReturn:  # noqa: D102
        end = "" if message.endswith((".", "?")) else "."
        self.exit(2, f"error: {message.removeprefix('argument ')}{end} See `{self.prog} --help`.\n")


def add_command(
    commands: Any, name: str, run: Any, help: str, example: str = "", reads: str = "", writes: str = "", **settings: Any
) -> Any:
    """Add a command and return its parser; `run` gets the options by name, `example` ends the help."""
    text = f"{help[0].upper()}{help[1:]}." + (f"\n\nreads:  {reads}\nwrites: {writes}" if reads else "")
    parser = commands.add_parser(name, help=help, **{"description": text} | settings)
    parser.epilog = f"example:\n  {parser.prog} {example}".rstrip()
    parser.set_defaults(run=run)
    return parser


def positive_int(text: str) -> int:
    """Read an integer >= 1 from a command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got '{text}'")
    return int(text)


def answering_keys(*roles: str) -> set[str]:
    """Return the keys of `apo-trl pairs` for roles, as `policy_`, that `anchor`, `compare` and `score` have, too."""
    of_roles = {key for key in known_keys() if key.startswith(roles) and not key.endswith("_model")}
    limits = {"concurrency", "max_requests", "max_cost", "max_failures", "function_timeout"}
    return of_roles | limits | {"seed", "cache_by_url"}


def exit_if_stopped(reason: str) -> None:
    """Exit with status 1 if a run stopped early."""
    if reason:
        sys.exit(stopped_line(reason))


def stopped_line(reason: str) -> str:
    """Return what a run prints last if it stopped early."""
    return f"Stopped early: {reason} Run the command again to resume."
