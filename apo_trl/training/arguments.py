"""Arguments of the training script, from the command line and from a YAML file, as TRL's dataclasses."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from apo_trl.errors import InputError, nearest
from apo_trl.io.messages import one_line
from apo_trl.io.resources import check_path, find_recipe, read_yaml

__all__ = ["Run", "check_paths", "parse", "with_recipe"]


class Run(NamedTuple):
    """The settings of one run, as TRL's dataclasses."""

    script: Any
    training: Any
    model: Any
    mixture: Any


def parse(arguments: Sequence[str], *, unpaired: bool = False) -> tuple[Run, list[str]]:
    """Parse a command line and its `--config` file.

    Args:
        arguments: Keys of `trl dpo` and options of `accelerate launch`; a recipe may come first.
        unpaired: Whether the settings are those of TRL's `KTOConfig`.

    Returns:
        The run, and the options of `accelerate launch` from both places.

    Raises:
        InputError: The file cannot be read, a key is unknown, or a value has the wrong type.
    """
    from trl import DatasetMixtureConfig, KTOConfig, ModelConfig, ScriptArguments, TrlParser

    from apo_trl.config import APOConfig
    from apo_trl.config.cpu import adapt_to_cpu

    class Parser(TrlParser):
        def error(self, message: str) -> NoReturn:
            raise InputError(f"{message.removeprefix('argument ').rstrip('.')}.")

        def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
            options, rest = super().parse_known_args(*args, **kwargs)
            adapt_to_cpu(options)
            return options, rest

    dataclasses = (ScriptArguments, KTOConfig if unpaired else APOConfig, ModelConfig, DatasetMixtureConfig)
    parser = Parser(dataclasses, prog="python -m apo_trl.train", allow_abbrev=False)
    for action in parser._actions:  # both spellings are accepted, and the help shows one
        action.option_strings = [option for option in action.option_strings if "-" not in option.lstrip("-")]
    arguments = with_recipe(arguments)
    launcher = _launcher_options()
    known = {option for action in parser._actions for option in action.option_strings} | {"--config"} | launcher
    if "--config" in arguments:
        path = Path(arguments[arguments.index("--config") + 1])
        keys = {option.removeprefix("--") for option in known} | {"env"}
        if unknown := [str(key) for key in read_yaml(path) if key not in keys]:
            hints = " ".join(f"'{key}'.{nearest(key, keys)}" for key in unknown)
            raise InputError(f"{path}: unknown key{'s' * (len(unknown) > 1)}: {hints}")
    try:
        *parsed, leftover = parser.parse_args_and_config(arguments, return_remaining_strings=True)
    except (ValueError, ImportError) as error:  # of TRL's dataclasses
        raise error if isinstance(error, InputError) else InputError(f"{one_line(error)}. Change it.") from error
    for before, option in zip(["", *leftover], leftover, strict=False):
        if option.startswith("--") and (name := option.split("=")[0]) not in launcher:
            raise InputError(f"{name}: unknown option.{nearest(name, known)}")
        if not option.startswith("-") and not before.startswith("-"):
            raise InputError(f"'{option}' belongs to no option. Put a recipe or YAML file first, or after --config.")
    return Run(*parsed), leftover


def with_recipe(arguments: Sequence[str]) -> list[str]:
    """Replace a recipe's name, first or after `--config`, by `--config` and the path of its file."""
    paths: list[str] = []
    for argument in arguments:
        paths += argument.split("=", 1) if argument.startswith("--config=") else [argument]
    if paths and not paths[0].startswith("-"):
        paths.insert(0, "--config")
    if paths[-1:] == ["--config"]:
        raise InputError("--config: required value missing. Add the path of a YAML file or the name of a recipe.")
    if "--config" in paths:
        index = paths.index("--config") + 1
        paths[index] = str(find_recipe(paths[index]))
    return paths


def check_paths(arguments: Sequence[str]) -> None:
    """Raise InputError for data or a model that is not at its path, before anything heavy is loaded.

    `arguments` are those that `with_recipe` returns.
    """
    from apo_trl.io.readers import check_dataset
    from apo_trl.models.packaged import MODEL_NAME

    config = read_yaml(Path(arguments[arguments.index("--config") + 1])) if "--config" in arguments else {}
    words = [word for argument in arguments for word in argument.split("=", 1)]
    config |= {word.removeprefix("--"): value for word, value in pairwise(words) if word.startswith("--")}
    if isinstance(name := config.get("dataset_name"), str):
        check_dataset(name)
    if isinstance(name := config.get("model_name_or_path"), str) and name != MODEL_NAME:
        check_path(name, "model_name_or_path", "folder")


def _launcher_options() -> set[str]:
    from accelerate.commands.launch import launch_command_parser

    options = {option for action in launch_command_parser()._actions for option in action.option_strings}
    return {option for option in options if option.startswith("--")} | {"--accelerate_config"}
