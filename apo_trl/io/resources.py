"""Files of this package: recipes, hardware configurations, and the demo's pairs."""

from pathlib import Path
from typing import Any

import yaml

from apo_trl.errors import InputError, nearest

__all__ = [
    "DEMO_PAIRS",
    "accelerate_config",
    "find_recipe",
    "hardware",
    "packaged",
    "pairs_names",
    "read_yaml",
    "recipe_folder",
    "recipe_names",
]

_PACKAGE = Path(__file__).parent.parent

DEMO_PAIRS = _PACKAGE / "demo" / "pairs"
"""The folder of the CLAIR pairs: `train.jsonl`, `test.jsonl` and their card."""


def recipe_folder() -> Path:
    """Give the folder that holds the recipes of this installation."""
    installed = _PACKAGE / "_recipes"
    return installed if installed.is_dir() else _PACKAGE.parent / "recipes"


def recipe_names() -> list[str]:
    """Give the recipes of runs by name: their path in the folder without `.yaml`, as in `smollm2-135m/demo`."""
    return [name for name in _names() if not name.startswith(("accelerate/", "pairs/"))]


def pairs_names() -> list[str]:
    """Give the recipes for building pairs by name, as in `pairs/clair`."""
    return [name for name in _names() if name.startswith("pairs/")]


def _names() -> list[str]:
    folder = recipe_folder()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def packaged(path: str) -> Path | None:
    """Find a path that begins with `apo_trl/`, as recipes name packaged data, wherever the package is installed."""
    inside = _PACKAGE.parent / path
    return inside if path.startswith("apo_trl/") and not Path(path).exists() and inside.exists() else None


def find_recipe(name: str) -> Path:
    """Give the YAML file that a path or the name of a recipe stands for."""
    if Path(name).is_file():
        return Path(name)
    known = [*recipe_names(), *pairs_names()]
    if name in known:
        return recipe_folder() / f"{name}.yaml"
    raise InputError(
        f"There is no file and no recipe '{name}'.{nearest(name, known)} `apo-trl recipes` lists the recipes."
    )


def accelerate_config(name: str) -> str:
    """Give the file of a hardware configuration of ours, or the name itself where it is none."""
    ours = recipe_folder() / "accelerate" / f"{name}.yaml"
    return str(ours) if ours.is_file() and not Path(name).is_file() else name


def hardware(name: str) -> dict[str, Any]:
    """Say what a hardware configuration shares out, as `plan` asks: `stage`, `offload` and `fsdp`."""
    path = Path(accelerate_config(name))
    if not path.is_file():
        known = sorted(file.stem for file in (recipe_folder() / "accelerate").glob("*.yaml"))
        raise InputError(
            f"accelerate_config: there is no '{name}'.{nearest(name, known)} There are {', '.join(known)}."
        )
    config = read_yaml(path)
    deepspeed = config.get("deepspeed_config", {})
    fsdp = config.get("distributed_type") == "FSDP"
    return {
        "stage": 3 if fsdp else deepspeed.get("zero_stage", 0),
        "offload": deepspeed.get("offload_optimizer_device", "none") != "none",
        "fsdp": fsdp,
    }


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a file of keys and values, or raise InputError for one that is not."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"The config file {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"The config file {path} is not UTF-8 text; save it as such.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # of a date that does not exist, of deep nesting
        # The line itself is not quoted: it may hold a key.
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or (error if isinstance(error, ValueError) else "it is nested too deep")
        raise InputError(f"The config file {path} is not YAML{where}: {what}.") from error
    if not isinstance(config, dict):
        raise InputError(f"The config file {path} must hold `key: value` lines.")
    return config
