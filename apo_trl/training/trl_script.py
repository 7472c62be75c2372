"""Start a script of TRL, for KTO, a reward model or RLOO, on the run that the training script has parsed."""

import logging
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from pydoc import ErrorDuringImport, locate
from typing import Any

import datasets

from apo_trl.errors import InputError
from apo_trl.models.loading import load_config, load_tokenizer
from apo_trl.models.packaged import resolve_model
from apo_trl.training.arguments import Run

__all__ = ["check_rewards", "prepare"]

logger = logging.getLogger(__name__)


def prepare(run: Run, dataset: Any) -> Callable[[str | None], None]:
    """Check a run; return the function that trains from a checkpoint or from the start.

    Args:
        run: The settings of TRL's script.
        dataset: The splits that the script gets, or None if it loads a mixture.

    Raises:
        InputError: The model or a reward cannot be found, or a setting is invalid.
    """
    script, training, model, _ = run
    check_rewards(run)
    name = getattr(script, "reward_model_name_or_path", None)
    if name and "/" not in name and not Path(name).is_dir():
        remedy = "Train it first, with `apo-trl train rlhf/reward_model`, or set its folder"
        raise InputError(f"reward_model_name_or_path: folder not found, got '{name}'. {remedy}.")
    name = model.model_name_or_path = resolve_model(model.model_name_or_path or "")
    load_config(name, revision=model.model_revision, trust_remote_code=training.trust_remote_code)
    main = import_module(f"trl.scripts.{run.trl_script}").main
    if dataset is not None:
        if run.trl_script == "rloo":
            has_template = load_tokenizer(name, revision=model.model_revision).chat_template is not None
            dataset = {split: _prompts(rows, split, has_template) for split, rows in dataset.items()}
        datasets.load_dataset = lambda *_, **__: dataset  # the script imports it when it starts

    def train_from(start: str | None) -> None:
        training.resume_from_checkpoint = start
        main(*run)

    return train_from


def check_rewards(run: Run) -> None:
    """Raise InputError for a reward of RLOO, or a task of a reward model's adapter, that TRL's script cannot use."""
    script, model = run.script, run.model
    if run.trl_script == "reward" and model.use_peft and model.lora_task_type != "SEQ_CLS":
        given = f"lora_task_type: must be SEQ_CLS for a reward model, got {model.lora_task_type}"
        raise InputError(f"{given}. Set it, so that the adapter has the layer `score`.")
    if run.trl_script == "rloo" and not (script.reward_funcs or script.reward_model_name_or_path):
        raise InputError("reward_funcs: required, not set. Set functions, or reward_model_name_or_path.")
    for name in getattr(script, "reward_funcs", None) or []:
        _check_function(name)


def _check_function(name: str) -> None:
    sys.path.insert(0, os.getcwd())  # as the script does
    try:
        found = locate(name if "." in name else f"trl.rewards.{name}")
    except ErrorDuringImport as error:
        raise InputError(f"reward_funcs: '{name}' cannot be imported, {error.value}. Correct the module.") from error
    finally:
        sys.path.pop(0)
    if not callable(found):
        remedy = "Set `module.function`, for example apo_trl.pairs.instructions.reward"
        raise InputError(f"reward_funcs: function not found, got '{name}'. {remedy}.")


def _prompts(rows: Any, split: str, has_template: bool) -> Any:
    """Return the rows with each prompt that is a string as a message: TRL applies the template to messages only."""
    first: dict[str, Any] = next(iter(rows), {"prompt": []})
    if "prompt" not in first:
        raise InputError(f"{split} dataset: has no column 'prompt', which RLOO needs. Add the column.")
    if not has_template or not isinstance(first["prompt"], str):
        return rows
    logger.info(f"{split} dataset: each prompt is a string, sent as one message of the user.")
    return rows.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
