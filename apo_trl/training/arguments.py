"""Arguments of the training script, from the command line and from a YAML file, as TRL's dataclasses."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from apo_trl.errors import InputError, nearest
from apo_trl.io.resources import find_recipe, read_yaml

__all__ = ["Run", "parse", "with_recipe"]


class Run(NamedTuple):
    """What one command line and one YAML file say, as TRL's dataclasses."""

    script: Any
    training: Any
    model: Any
    mixture: Any


def parse(arguments: Sequence[str], *, unpaired: bool = False) -> tuple[Run, list[str]]:
    """Read a command line and its `--config` file, with TRL's `KTOConfig` for the settings where `unpaired`.

    Gives the run and what is left over: the arguments of `accelerate launch`, from both places. Raises InputError for a
    file that cannot be read, a key that nobody knows (with the nearest known one) and a value of the wrong type.
    """
    from trl import DatasetMixtureConfig, KTOConfig, ModelConfig, ScriptArguments, TrlParser

    from apo_trl.config import APOConfig

    class Parser(TrlParser):
        def error(self, message: str) -> NoReturn:
            raise InputError(f"{message[0].upper()}{message[1:].rstrip('.')}.")

    dataclasses = (ScriptArguments, KTOConfig if unpaired else APOConfig, ModelConfig, DatasetMixtureConfig)
    parser = Parser(dataclasses, prog="python -m apo_trl.train", allow_abbrev=False)
    arguments = with_recipe(arguments)
    known = {option for action in parser._actions for option in action.option_strings} | {"--config"}
    launcher = _launcher_options()
    _check_keys(arguments, {option.removeprefix("--") for option in known | launcher})
    *parsed, leftover = parser.parse_args_and_config(arguments, return_remaining_strings=True)
    for before, option in zip(["", *leftover], leftover, strict=False):
        if option.startswith("--") and (name := option.split("=")[0]) not in launcher:
            raise InputError(f"The option {name} does not exist.{nearest(name, known | launcher)}")
        if not option.startswith("-") and not before.startswith("-"):
            raise InputError(f"'{option}' belongs to no option. A recipe or YAML file comes first, or after --config.")
    return Run(*parsed), leftover


def _config_in_two(argument: str) -> list[str]:
    return argument.split("=", 1) if argument.startswith("--config=") else [argument]


def _launcher_options() -> set[str]:
    from accelerate.commands.launch import launch_command_parser

    options = {option for action in launch_command_parser()._actions for option in action.option_strings}
    return {option for option in options if option.startswith("--")} | {"--accelerate_config"}


def with_recipe(arguments: Sequence[str]) -> list[str]:
    """Put the file in the place of a recipe's name, given first or after `--config`."""
    given = [part for argument in arguments for part in _config_in_two(argument)]
    if given and not given[0].startswith("-"):
        given.insert(0, "--config")
    if "--config" in given:
        at = given.index("--config") + 1
        if at == len(given):
            raise InputError("--config needs the path of a YAML file or the name of a recipe after it.")
        given[at] = str(find_recipe(given[at]))
    return given


def _check_keys(arguments: Sequence[str], known: set[str]) -> None:
    if "--config" in arguments:
        path = Path(arguments[list(arguments).index("--config") + 1])
        unknown = [str(key) for key in read_yaml(path) if key not in known | {"env"}]
        if len(unknown) == 1:
            raise InputError(f"The key '{unknown[0]}' in {path} does not exist.{nearest(unknown[0], known)}")
        if unknown:
            each = " ".join(f"'{key}'.{nearest(key, known)}" for key in unknown)
            raise InputError(f"{len(unknown)} keys in {path} do not exist: {each}")
