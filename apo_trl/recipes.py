"""The recipes: one YAML file, one run. Find them, list them, check them against the installed classes.

They ship in the wheel, and lie beside the package in a checkout. `recipes/accelerate/` is hardware and no run.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .inputs import InputError, nearest, row_fault

__all__ = [
    "Finding",
    "accelerate_config",
    "check",
    "describe",
    "find_recipe",
    "hardware",
    "is_unpaired",
    "packaged",
    "pairs_names",
    "read_yaml",
    "recipe_folder",
    "recipe_names",
]

_UNPAIRED = {"kto", "apo_zero_unpaired"}  # the losses of TRL's KTOTrainer


class Finding(NamedTuple):
    """Something that a recipe's user should know: an error stops or spoils the run, a note does not."""

    level: str
    text: str


def recipe_folder() -> Path:
    """Give the folder that holds the recipes of this installation."""
    package = Path(__file__).parent
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


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
    inside = Path(__file__).parent.parent / path
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


def describe(name: str) -> dict[str, str]:
    """Say what a recipe is: `name`, `model`, `loss`, `method` and `hardware`, in words for a table."""
    path = find_recipe(name)
    config = read_yaml(path)
    losses = config.get("loss_type", "apo_zero")
    method = "LoRA" if config.get("use_peft") else "full"
    hardware = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# Hardware:")]
    return {
        "name": name,
        "model": str(config.get("model_name_or_path", "packaged SmolLM2-135M")).split("/")[-1],
        "loss": losses if isinstance(losses, str) else "+".join(losses),
        "method": "QLoRA" if config.get("load_in_4bit") else method,
        "hardware": hardware[0].removeprefix("# Hardware:").split(";")[0].strip(" .") if hardware else "",
    }


def is_unpaired(path: Path) -> bool:
    """Say whether a file is for TRL's KTOTrainer, whose settings are of another class."""
    losses = read_yaml(path).get("loss_type", [])
    return bool(_UNPAIRED.intersection([losses] if isinstance(losses, str) else losses))


def check(name: str) -> list[Finding]:
    """Find what the host would refuse, ignore, or fail on only later, in a recipe or any file for `apo-trl train`."""
    path = find_recipe(name)
    if "method" in read_yaml(path):
        return list(_pairs(path))
    unpaired = is_unpaired(path)
    try:
        from .train import parse

        # What a GPU would refuse or take is not asked on the machine where a file is checked.
        run, _ = parse(["--config", str(path), "--use_cpu"], unpaired=unpaired)
    except ValueError as error:  # an InputError of ours, or what the host's classes refuse
        return [Finding("error", str(error))]
    return list(dict.fromkeys([*_settings(run, unpaired), *_data(run, unpaired)]))  # splits may share a finding


def _pairs(path: Path) -> Iterator[Finding]:
    from .data import check_installed

    try:
        check_installed()
        from .data.build import check_templates
        from .data.settings import parse

        check_templates(parse(str(path), {}, environment=False))
    except InputError as error:
        yield Finding("error", str(error))


def _settings(run: Any, unpaired: bool) -> Iterator[Finding]:
    from .config import SMOOTHED, loss_names
    from .losses import PER_TOKEN

    training, model = run.training, run.model
    names = loss_names(training)
    for bits in (4, 8):
        if getattr(model, f"load_in_{bits}bit"):
            if not model.use_peft:
                yield Finding(
                    "error",
                    f"load_in_{bits}bit without use_peft: quantised weights cannot be trained. Set use_peft: true.",
                )
            if find_spec("bitsandbytes") is None:
                yield Finding("error", f"load_in_{bits}bit needs bitsandbytes: run `pip install 'apo-trl[qlora]'`.")
    if model.use_peft and "lm_head" in (model.lora_target_modules or []):
        yield Finding("error", "lora_target_modules names lm_head, which TRL refuses: remove it, or take all-linear.")
    if not unpaired and training.label_smoothing and not SMOOTHED.intersection(names):
        yield Finding("note", f"label_smoothing has no effect on {', '.join(names)}: remove it.")
    if (PER_TOKEN - {"ipo"}).intersection(names) and training.beta < 1:
        yield Finding(
            "note",
            f"beta {training.beta:g} is small for {', '.join(names)}, which sees log-ratios per token: 5 is usual.",
        )
    pairs = training.per_device_train_batch_size * training.gradient_accumulation_steps
    yield Finding(
        "note", f"batch: {pairs} {'answers' if unpaired else 'pairs'} a step and process, times the processes."
    )


def _data(run: Any, unpaired: bool) -> Iterator[Finding]:
    """Look at local data; that of a hub is not fetched for a check."""
    from .dataset import builder_of, is_local
    from .train import load_splits

    name = run.script.dataset_name
    if unpaired or not name or run.mixture.datasets or not (builder_of(name) or is_local(name)):
        return
    try:
        splits = load_splits(run)
    except InputError as error:
        yield Finding("error", str(error))
        return
    for split, rows in splits.items():
        needs_wins = "apo_blend" in run.training.loss_type
        for number, row in enumerate(rows):
            if fault := row_fault(row, needs_wins=needs_wins):
                yield Finding("error", f"Row {number} of the {split} dataset {fault}.")
                break
        else:
            yield from _prompts(run, split, rows)


def _prompts(run: Any, split: str, rows: Any) -> Iterator[Finding]:
    longest = run.training.max_length
    first: dict[str, Any] = next(iter(rows), {})
    if longest is None or "prompt" not in first:
        return
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(run.model.model_name_or_path, revision=run.model.model_revision)
    except (OSError, ValueError):
        yield Finding("note", f"prompts not measured: no tokenizer of {run.model.model_name_or_path} is here.")
        return

    def tokens(prompt: Any) -> int:
        if isinstance(prompt, str):
            return len(tokenizer(prompt)["input_ids"])
        return len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"])

    too_long = sum(tokens(row["prompt"]) >= longest for row in rows)
    if too_long:
        yield Finding(
            "error",
            f"max_length {longest} is filled by the prompt alone in {too_long} of {len(rows)} rows of the {split} "
            "dataset, which would be left out: raise max_length.",
        )
