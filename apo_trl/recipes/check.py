"""Check a recipe, or any file for `apo-trl train`, `pairs build` or `rounds`, against the installed classes."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from apo_trl.errors import InputError
from apo_trl.io.resources import find_recipe, read_yaml, recipe_folder
from apo_trl.recipes.catalog import local_dataset

__all__ = ["Finding", "check"]


class Finding(NamedTuple):
    """An "error", which stops or spoils the run, or a "note"."""

    level: str
    text: str


def check(name: str) -> list[Finding]:
    """Find what TRL would refuse or ignore in a file, and what would fail only later."""
    path = find_recipe(name)
    findings = list[Finding]()
    try:
        values = read_yaml(path)
        if "method" in values:
            _check_pairs_recipe(str(path))
        elif "pairs" in values:
            _check_rounds_recipe(str(path))
        else:
            from apo_trl.training.arguments import parse

            # --use_cpu: the run may be on another machine, with a GPU that this one does not have.
            run, _ = parse(["--config", str(path), "--use_cpu"])
            findings += _settings(run)
            findings += _data(run) if run.trl_script in ("dpo", "reward") else []
    except ValueError as error:  # InputError, or what TRL's dataclasses raise
        findings.append(Finding("error", str(error)))
    return list(dict.fromkeys(findings))  # two splits may have the same


def _check_pairs_recipe(path: str) -> None:
    from apo_trl.pairs import check_installed

    check_installed()
    from apo_trl.pairs.build import check_inputs, check_templates
    from apo_trl.pairs.config.settings import parse

    is_packaged = Path(path).is_relative_to(recipe_folder())  # then prompts are to be set
    (check_templates if is_packaged else check_inputs)(parse(path, {}, environment=False))


def _check_rounds_recipe(path: str) -> None:
    from apo_trl.pairs import check_installed

    check_installed()
    from apo_trl.rounds import run, settings

    with TemporaryDirectory() as folder:
        run.check(settings.parse(path).model_copy(update={"output_dir": folder}))


def _settings(run: Any) -> Iterator[Finding]:
    training, model = run.training, run.model
    for key in ("load_in_4bit", "load_in_8bit"):
        if getattr(model, key) and not model.use_peft:
            yield Finding("error", f"{key}: requires use_peft, quantised weights are not trained. Set use_peft: true.")
        if getattr(model, key) and find_spec("bitsandbytes") is None:
            yield Finding("error", f"{key}: bitsandbytes not found. Run `pip install 'apo-trl[qlora]'`.")
    if model.use_peft and "lm_head" in (model.lora_target_modules or []):
        yield Finding("error", "lora_target_modules: lm_head is not supported by TRL. Remove it, or set all-linear.")
    size = training.per_device_train_batch_size * training.gradient_accumulation_steps
    unit = {"dpo": "pairs", "reward": "pairs"}.get(run.trl_script, "answers")
    yield Finding("note", f"batch: {size} {unit} per step and process.")
    if run.trl_script == "dpo":
        yield from _loss(training)
    else:
        from apo_trl.training.trl_script import check_rewards

        check_rewards(run)


def _loss(training: Any) -> Iterator[Finding]:
    from apo_trl.config import SMOOTHED_LOSSES, loss_names
    from apo_trl.losses import PER_TOKEN_LOSSES

    losses = loss_names(training)
    names = ", ".join(losses)
    if training.label_smoothing and not SMOOTHED_LOSSES.intersection(losses):
        yield Finding("note", f"label_smoothing: no effect on {names}. Remove it.")
    if (PER_TOKEN_LOSSES - {"ipo"}).intersection(losses) and training.beta < 1:
        yield Finding("note", f"beta: {training.beta:g} is small for {names}, with log-ratios per token. 5 is usual.")


def _data(run: Any) -> Iterator[Finding]:
    from apo_trl.datasets.preprocessing import normalise_datasets
    from apo_trl.io.tokenization import encode_pair, first_failure
    from apo_trl.models.loading import load_tokenizer
    from apo_trl.training.script import select_splits

    model, longest = run.model.model_name_or_path, run.training.max_length
    wins = "apo_blend" in getattr(run.training, "loss_type", [])
    tokenizer: Any = None
    if splits := local_dataset(run):
        select_splits(splits, run)
        try:
            tokenizer = load_tokenizer(model, only_here=True) if model else None
        except InputError:
            yield Finding("note", f"max_length: not checked, no tokenizer of {model} is here.")
    for split, rows in splits.items():
        try:
            rows = normalise_datasets(rows, split, wins)
        except InputError as error:
            yield Finding("error", str(error))
            continue
        if tokenizer is None:
            continue
        if failure := first_failure(rows, split, tokenizer):
            yield Finding("error", failure)
        elif longest is not None and getattr(run.training, "truncation_mode", "") != "keep_end":
            too_long = [len(encode_pair(tokenizer, row)[0]) >= longest for row in rows]
            if any(too_long):
                count = f"{sum(too_long)} of {len(too_long)} rows of the {split} dataset"
                text = f"max_length: {longest} is filled by the prompt alone in {count}. Set a larger value."
                yield Finding("error", text)
