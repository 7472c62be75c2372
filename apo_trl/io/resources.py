"""Files of this package: recipes, hardware configurations, and the CLAIR pairs."""

from pathlib import Path
from typing import Any

import yaml

from apo_trl.errors import InputError, nearest

__all__ = ["DEMO_PAIRS", "accelerate_config", "check_path", "find_recipe", "hardware", "nearest_path", "packaged"]
__all__ += ["read_yaml", "recipe_folder", "recipe_names"]

_PACKAGE = Path(__file__).parent.parent

DEMO_PAIRS = _PACKAGE / "demo" / "pairs"
"""The folder of the CLAIR pairs: `train.jsonl`, `test.jsonl` and their card."""


def recipe_folder() -> Path:
    """Return the folder of the recipes: in the wheel, or beside the package in a checkout."""
    installed = _PACKAGE / "_recipes"
    return installed if installed.is_dir() else _PACKAGE.parent / "recipes"


def recipe_names(folder: str = "") -> list[str]:
    """Return the names of the recipes in a folder, as `pairs`, or else of those for training: `smollm2-135m/demo`."""
    root = recipe_folder()
    paths = (root / folder).rglob("*.yaml")
    names = sorted(path.relative_to(root).with_suffix("").as_posix() for path in paths)
    return [name for name in names if folder or not name.startswith(("accelerate/", "pairs/", "rounds/"))]


def packaged(path: str) -> Path | None:
    """Return the packaged file or folder of a path that begins with `apo_trl/`, as recipes write it, or None."""
    inside = _PACKAGE.parent / path
    return inside if path.startswith("apo_trl/") and not Path(path).exists() and inside.exists() else None


def check_path(name: str, field: str, kind: str) -> None:
    """Raise InputError if a name is spelt as a path, and no such file or folder exists."""
    is_path = name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1
    if is_path and not Path(name).exists() and packaged(name) is None:
        raise InputError(f"{field}: {kind} not found, got '{name}'.{nearest_path(name)} Check the path.")


def nearest_path(name: str) -> str:
    """Return " Did you mean './model'?" with the file or folder beside a missing one that is closest to its name."""
    path = Path(name)
    beside = [str(other) for other in path.parent.iterdir()] if path.parent.is_dir() else []
    return nearest(str(path), beside)


def find_recipe(name: str) -> Path:
    """Return the YAML file of a path or of a recipe's name."""
    if Path(name).is_file():
        return Path(name)
    known = [*recipe_names(), *recipe_names("pairs"), *recipe_names("rounds")]
    if name in known:
        return recipe_folder() / f"{name}.yaml"
    raise InputError(
        f"recipe: '{name}' not found.{nearest(name, known)} Use a YAML file or a recipe of `apo-trl recipes`."
    )


def accelerate_config(name: str) -> str:
    """Return the file of a packaged hardware configuration, or the name itself."""
    ours = recipe_folder() / "accelerate" / f"{name}.yaml"
    return str(ours) if ours.is_file() and not Path(name).is_file() else name


def hardware(name: str) -> dict[str, Any]:
    """Read the sharding of a hardware configuration, as `plan` takes it: `stage`, `offload` and `fsdp`."""
    path = Path(accelerate_config(name))
    if not path.is_file():
        known = sorted(file.stem for file in (recipe_folder() / "accelerate").glob("*.yaml"))
        raise InputError(
            f"accelerate_config: '{name}' not found.{nearest(name, known)} Use a file or one of {', '.join(known)}."
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
    """Read a YAML file of keys and values. No message quotes its lines: they may hold a key."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text. Save it as UTF-8.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # of a date that does not exist, of deep nesting
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or (error if isinstance(error, ValueError) else "it is nested too deep")
        raise InputError(f"{path}: invalid YAML{where}: {what}. Correct the file.") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: must have `key: value` lines. Correct the file.")
    return config
