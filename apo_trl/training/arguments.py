"""Arguments of the training script, from the command line and from a YAML file, as TRL's dataclasses."""

from collections.abc import Mapping, Sequence
from dataclasses import field, make_dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from apo_trl.errors import InputError, nearest
from apo_trl.io.error_text import one_line
from apo_trl.io.resources import check_path, find_recipe, read_yaml

__all__ = ["Run", "check_paths", "parse", "trl_script", "with_recipe"]

_UNPAIRED = {"kto", "apo_zero_unpaired"}
_SCRIPT_OF_KEY = {
    "reward_funcs": "rloo",
    "reward_model_name_or_path": "rloo",
    "num_generations": "rloo",
    "center_rewards_coefficient": "reward",
}


class Run(NamedTuple):
    """The settings of one run, as TRL's dataclasses."""

    script: Any
    training: Any
    model: Any
    mixture: Any

    @property
    def trl_script(self) -> str:
        """The script of TRL that trains, "kto", "reward" or "rloo", or "dpo" for ours, which has its keys."""
        name = type(self.training).__name__.removesuffix("Config").lower()
        return "dpo" if name == "apo" else name


def trl_script(values: Mapping[str, Any]) -> str:
    """Return which script of TRL has the keys of a run: "kto", "reward", "rloo" or "dpo"."""
    losses = values.get("loss_type") or []
    if losses and _UNPAIRED.issuperset([losses] if isinstance(losses, str) else losses):
        return "kto"
    if values.get("lora_task_type") == "SEQ_CLS":
        return "reward"
    return next((script for key, script in _SCRIPT_OF_KEY.items() if key in values), "dpo")


def parse(arguments: Sequence[str], *, script: str | None = None) -> tuple[Run, list[str]]:
    """Parse a command line and its `--config` file.

    Args:
        arguments: Keys of a script of TRL and options of `accelerate launch`; a recipe may come first.
        script: The script that has the keys (default: `trl_script` of the arguments).

    Returns:
        The run, and the options of `accelerate launch` from both places.

    Raises:
        InputError: The file cannot be read, a key is unknown, or a value has the wrong type.
    """
    from trl import TrlParser

    from apo_trl.config import APOConfig
    from apo_trl.config.cpu import adapt_to_cpu

    class Parser(TrlParser):
        def error(self, message: str) -> NoReturn:
            raise InputError(f"{message.removeprefix('argument ').rstrip('.')}.")

        def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
            options, rest = super().parse_known_args(*args, **kwargs)
            adapt_to_cpu(options)
            return options, rest

    arguments = with_recipe(arguments)
    script = script or trl_script(_values(arguments))
    dataclasses = list(import_module(f"trl.scripts.{script}").make_parser().dataclass_types)
    if script == "dpo":
        help = {"help": "model to hold the policy to; default: the policy's start"}
        reference = ("ref_model_name_or_path", str | None, field(default=None, metadata=help))
        dataclasses[:2] = make_dataclass("ScriptArguments", [reference], bases=(dataclasses[0],)), APOConfig
    parser = Parser(dataclasses, prog="python -m apo_trl.train", allow_abbrev=False)
    for action in parser._actions:  # both spellings are accepted, and the help shows one
        action.option_strings = [option for option in action.option_strings if "-" not in option.lstrip("-")]
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

    config = _values(arguments)
    if isinstance(name := config.get("dataset_name"), str):
        check_dataset(name)
    if isinstance(name := config.get("model_name_or_path"), str) and name != MODEL_NAME:
        check_path(name, "model_name_or_path", "folder")


def _values(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the keys of the `--config` file and of the command line, there with the first word of each value."""
    config = read_yaml(Path(arguments[arguments.index("--config") + 1])) if "--config" in arguments else {}
    words = [word for argument in arguments for word in argument.split("=", 1)]
    return config | {word.removeprefix("--"): value for word, value in pairwise(words) if word.startswith("--")}


def _launcher_options() -> set[str]:
    from accelerate.commands.launch import launch_command_parser

    options = {option for action in launch_command_parser()._actions for option in action.option_strings}
    return {option for option in options if option.startswith("--")} | {"--accelerate_config"}
