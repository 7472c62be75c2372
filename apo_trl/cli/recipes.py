"""The commands `apo-trl recipes ...`."""

import sys
from pathlib import Path
from typing import Any

from apo_trl.cli.options import add_command, positive_int
from apo_trl.errors import InputError
from apo_trl.io.files import atomic_write
from apo_trl.io.resources import find_recipe, hardware, recipe_names
from apo_trl.training.console import quiet_libraries

_TABLE = "nothing; prints a table"


def add(commands: Any) -> None:
    help, files = "list, show, copy and check recipes, or plan their memory", "the packaged recipes"
    recipes = add_command(commands, "recipes", list_recipes, help, "", files, _TABLE)
    actions = recipes.add_subparsers(title="actions", metavar="ACTION")
    add_command(actions, "list", list_recipes, "list the recipes (the default)", "", files, _TABLE)
    help, one = "print a recipe: its purpose, command, hardware, sources and keys", "a recipe of `apo-trl recipes`"
    action = add_command(actions, "show", show, help, "smollm2-135m/demo", one, "nothing; prints the text")
    action.add_argument("name", metavar="NAME", help="recipe to print")
    help, example = "copy a recipe to a new file, to change it", "smollm2-135m/demo mine.yaml"
    action = add_command(actions, "copy", copy, help, example, one, "FILE, a new one")
    action.add_argument("name", metavar="NAME", help="recipe to copy")
    action.add_argument("file", metavar="FILE", type=Path, help="new file")
    help, files = "find errors in a recipe before it runs; exit with 1 if there are any", "FILE, and its local data"
    action = add_command(actions, "check", check, help, "smollm2-135m/demo", files, "nothing; prints findings")
    action.add_argument("files", metavar="FILE", nargs="+", help="a YAML file or the name of a recipe")
    help, example = "estimate memory per GPU, and suggest what to change", "qwen3-1.7b/apo_zero_lora --gpu_memory 24"
    files, usage = "a recipe, and the shape of its model", "%(prog)s NAME --gpu_memory GB [--gpus N] [--key value ...]"
    action = add_command(actions, "plan", plan, help, example, files, _TABLE, usage=usage)
    action.keeps_rest = True
    action.add_argument("name", metavar="NAME", help="a YAML file or the name of a recipe")
    action.add_argument("--gpus", type=positive_int, default=1, metavar="N", help="GPUs (default: %(default)s)")
    action.add_argument("--gpu_memory", type=float, required=True, metavar="GB", help="memory of one GPU")
    action.add_argument("--accelerate_config", default="ddp", metavar="NAME", help="hardware (default: %(default)s)")


def list_recipes() -> None:
    from apo_trl.recipes.catalog import describe

    rows = [describe(name) for name in recipe_names()]
    table = [tuple(rows[0]), *(tuple(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    print()
    for folder, command in (("pairs", "pairs build"), ("rounds", "rounds")):
        print(f"For `apo-trl {command}`: {', '.join(recipe_names(folder))}")


def show(name: str) -> None:
    print(find_recipe(name).read_text(encoding="utf-8"), end="")


def copy(name: str, file: Path) -> None:
    if file.exists():
        raise InputError(f"FILE: {file} exists. Set another file or remove it.")
    text = find_recipe(name).read_text(encoding="utf-8")
    with atomic_write(file) as beside:
        beside.write_text(text, encoding="utf-8")


def check(files: list[str]) -> None:
    quiet_libraries()
    from apo_trl.recipes.check import check as find

    failed = False
    for name in files:
        findings = find(name)
        errors = any(finding.level == "error" for finding in findings)
        failed |= errors
        print(f"{name}: {'errors' if errors else 'ok'}")
        for finding in findings:
            print(f"  {finding.level}: {finding.text}")
    sys.exit(failed)


def plan(name: str, gpus: int, gpu_memory: float, accelerate_config: str, rest: list[str]) -> None:
    quiet_libraries()
    from apo_trl.recipes.memory import plan as planning
    from apo_trl.training.arguments import parse

    run, _ = parse([name, "--use_cpu", *rest])
    estimate = planning.from_recipe(run, gpus=gpus, **hardware(accelerate_config))
    print(f"{planning.table(estimate)}\n{planning.verdict(estimate, gpu_memory)}")
