"""The recipes: one YAML file, one run. Find them, list them, check them against the installed classes.

They ship in the wheel, and lie beside the package in a checkout. `recipes/accelerate/` is hardware and no run.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from apo_trl.errors import InputError
from apo_trl.io.resources import find_recipe, read_yaml
from apo_trl.io.rows import validate_row
from apo_trl.recipes.catalog import is_unpaired

__all__ = ["Finding", "check"]


class Finding(NamedTuple):
    """Something that a recipe's user should know: an error stops or spoils the run, a note does not."""

    level: str
    text: str


def check(name: str) -> list[Finding]:
    """Find what the host would refuse, ignore, or fail on only later, in a recipe or any file for `apo-trl train`."""
    path = find_recipe(name)
    if "method" in read_yaml(path):
        return list(_pairs(path))
    unpaired = is_unpaired(path)
    try:
        from apo_trl.training.arguments import parse

        # What a GPU would refuse or take is not asked on the machine where a file is checked.
        run, _ = parse(["--config", str(path), "--use_cpu"], unpaired=unpaired)
    except ValueError as error:  # an InputError of ours, or what the host's classes refuse
        return [Finding("error", str(error))]
    return list(dict.fromkeys([*_settings(run, unpaired), *_data(run, unpaired)]))  # splits may share a finding


def _pairs(path: Path) -> Iterator[Finding]:
    from apo_trl.pairs import check_installed

    try:
        check_installed()
        from apo_trl.pairs.build import check_templates
        from apo_trl.pairs.config.settings import parse

        check_templates(parse(str(path), {}, environment=False))
    except InputError as error:
        yield Finding("error", str(error))


def _settings(run: Any, unpaired: bool) -> Iterator[Finding]:
    from apo_trl.config import SMOOTHED_LOSSES, loss_names
    from apo_trl.losses import PER_TOKEN_LOSSES

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
    if not unpaired and training.label_smoothing and not SMOOTHED_LOSSES.intersection(names):
        yield Finding("note", f"label_smoothing has no effect on {', '.join(names)}: remove it.")
    if (PER_TOKEN_LOSSES - {"ipo"}).intersection(names) and training.beta < 1:
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
    from apo_trl.io.readers import file_builder, is_local
    from apo_trl.training.script import load_run_dataset

    name = run.script.dataset_name
    if unpaired or not name or run.mixture.datasets or not (file_builder(name) or is_local(name)):
        return
    try:
        splits = load_run_dataset(run)
    except InputError as error:
        yield Finding("error", str(error))
        return
    for split, rows in splits.items():
        needs_wins = "apo_blend" in run.training.loss_type
        for number, row in enumerate(rows):
            if fault := validate_row(row, needs_wins=needs_wins):
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
