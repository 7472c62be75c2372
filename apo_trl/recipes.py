"""Find the recipes: one YAML file, one run. They ship in the wheel, and lie beside the package in a checkout."""

from pathlib import Path

from .inputs import InputError, nearest

__all__ = ["find_recipe", "recipe_folder"]


def recipe_folder() -> Path:
    """Give the folder that holds the recipes of this installation."""
    package = Path(__file__).parent
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def find_recipe(name: str) -> Path:
    """Give the file of a recipe, named as its path in the folder without `.yaml`: `smollm2-135m/demo`."""
    folder = recipe_folder()
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml"))
        raise InputError(f"There is no recipe '{name}'.{nearest(name, known)} There are: {', '.join(known)}.")
    return path
