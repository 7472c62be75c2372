"""Run a TRL script with the losses registered: `accelerate launch -m apo_trl.run [--set KEY=VALUE] SCRIPT [args]`."""

import argparse
import re
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from apo_trl.errors import InputError

__all__ = ["add_arguments", "main", "run_script"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the script of a command line, of `sys.argv` by default, and end as the commands of `apo-trl` do."""
    from apo_trl.training.console import exit_on_error

    parser = argparse.ArgumentParser("python -m apo_trl.run", description=__doc__, allow_abbrev=False)
    add_arguments(parser)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # of launchers that set LOCAL_RANK, too
    options = vars(parser.parse_args(arguments))
    del options["local_rank"]
    with exit_on_error():
        run_script(**options)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--set`, the script, and its arguments to a parser."""
    help = "set a key of the script's DPOConfig or APOConfig, whatever the script sets it to; repeatable"
    parser.add_argument("--set", dest="settings", metavar="KEY=VALUE", action="append", default=[], help=help)
    parser.add_argument("script", metavar="SCRIPT", help="path of a Python file")
    help = "arguments of the script; one that the script does not read stops the run before training"
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=help).required = False  # as if it were "*"


def run_script(script: str, arguments: list[str], settings: list[str]) -> None:
    """Run a script as `__main__`; its `datasets.load_dataset` also takes a local file, as `apo_trl.train`.

    Args:
        script: Path of a Python file.
        arguments: The script's own arguments. The run stops before training if the script does not read them.
        settings: `KEY=VALUE` for each `DPOConfig` or `APOConfig` of the script.

    Raises:
        InputError: The script is not a Python file, does not read an argument, or a setting cannot be applied.
    """
    while settings and arguments and (script == "--set" or re.match(r"\w+=", script)):  # --set a=1 b=2 SCRIPT
        settings = settings + [script] * (script != "--set")
        script, *arguments = arguments
    path = Path(script)
    if not path.is_file():
        raise InputError(f"script: file not found, got '{script}'. Set the path of a Python file.")
    if path.suffix in (".ipynb", ".yaml", ".yml"):
        start = "Use `apo-trl train` for a YAML file, and `jupyter nbconvert --to script` for a notebook."
        raise InputError(f"script: must be a Python file, got '{script}'. {start}")

    from apo_trl.training.console import quiet_libraries
    from apo_trl.training.threads import choose_threads

    choose_threads()
    quiet_libraries()
    import datasets

    from apo_trl.io.readers import load_dataset
    from apo_trl.registration import register
    from apo_trl.training.launcher import end_with_launcher
    from apo_trl.training.overrides import checked_script
    from apo_trl.training.progress import show_progress

    end_with_launcher()
    register()
    show_progress()
    datasets.load_dataset = load_dataset
    sys.path.insert(0, str(path.resolve().parent))
    with checked_script(script, arguments, settings):
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
