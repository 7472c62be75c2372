"""Errors and warnings of settings: what a run with valid ones, close to the defaults, does not load."""

from collections.abc import Collection
from math import inf
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from accelerate.logging import get_logger
from packaging.version import Version
from pydantic import ValidationError

from apo_trl.errors import InputError, nearest

__all__ = ["check_names", "check_order", "check_value", "output_dir_error", "warn_of_smoothing"]

logger = get_logger(__name__)

_OTHER_NAMES = {
    "apo": "apo_zero", "dpo": "sigmoid", "dpo_norm": "sigmoid_norm", "rdpo": "robust", "sppo": "sppo_hard",
    "nca": "nca_pair", "exo": "exo_pair", "bco": "bco_pair",
}  # fmt: skip
_OTHER_TRAINERS = {
    "kto": "It learns from single answers: use the recipe qwen3-0.6b/kto_apo_zero_unpaired.",
    "orpo": "It is not a loss of TRL's DPOTrainer, since it has no reference.",
    "simpo": "It is not a loss of TRL's DPOTrainer, since it has no reference; sigmoid_norm is length-normalised, too.",
}


def check_names(
    config: Any, names: list[str], added: Collection[str], known: Collection[str], modes: Collection[str]
) -> None:
    """Raise InputError if a loss is not `known`, one of those `added` conflicts, or truncation is not in `modes`."""
    if (mode := str(config.truncation_mode)) not in modes:
        raise InputError(f"truncation_mode: '{mode}' is unknown.{nearest(mode, modes)} Use one of {', '.join(modes)}.")
    if not names:
        raise InputError(f"loss_type: required, got an empty list. Use one or more of {', '.join(known)}.")
    for name in names:
        if name not in known:
            usual = name.lower().replace("-", "_")
            usual = _OTHER_NAMES.get(usual, usual)
            hint = f" {_OTHER_TRAINERS[usual]}" if usual in _OTHER_TRAINERS else nearest(usual, known)
            raise InputError(f"loss_type: '{name}' is unknown.{hint} Use one of {', '.join(known)}.")
        for option, default in (("f_divergence_type", "reverse_kl"), ("use_weighting", False)):
            if name in added and (value := getattr(config, option)) != default:
                fault = f"{option}: {value!r} is not supported with loss_type '{name}'"
                raise InputError(f"{fault}. Set it to {default!r}.")
    if config.loss_weights and len(config.loss_weights) != len(names):
        raise InputError(
            f"loss_weights: must have one weight for each of the {len(names)} losses in loss_type "
            f"({', '.join(names)}), got {len(config.loss_weights)}. Add or remove weights."
        )


def check_value(config: Any, error: ValidationError) -> None:
    """Raise InputError for the first setting of the wrong type, such as a number in quotes, or out of its bounds."""
    for fault in error.errors():
        name, value = fault["loc"][0], fault["input"]
        kind, is_number = fault["type"], isinstance(value, Number | np.bool_)
        # Integers of NumPy are numbers, 1 is true, None false, a tuple a list, and `max_grad_norm` may be infinite.
        if (kind in ("int_type", "float_type", "bool_type") and is_number) or (kind == "bool_type" and value is None):
            continue
        if (kind == "list_type" and isinstance(value, tuple)) or (value == inf and name == "max_grad_norm"):
            continue
        must, quotes = fault["msg"].removeprefix("Input should "), ", without quotes" if isinstance(value, str) else ""
        default = type(config).__dataclass_fields__[name].default
        remedy = f"Change it{quotes}; the default is {default!r}"
        raise InputError(f"{name}: must {must}, got {value!r}. {remedy}.") from None


def output_dir_error(folder: str, existing: Path) -> InputError:
    """Return the error for an output folder in which nothing can be written, since `existing` allows none."""
    fault = "cannot be written" if existing.is_dir() else "is a file"
    return InputError(f"output_dir: '{folder}' cannot be used, because {existing} {fault}. Set another folder.")


def check_order(config: Any) -> None:
    """Raise InputError if `group_by_prompt` and a setting of transformers both order the rows."""
    if Version(transformers.__version__) < Version("5"):  # goes when that is the floor
        other = "group_by_length=True" if config.group_by_length else ""
    else:
        strategy = config.train_sampling_strategy
        other = "" if strategy == "random" else f"train_sampling_strategy='{strategy}'"
    if other:
        raise InputError(f"group_by_prompt: conflicts with {other}: both set the sampling order. Unset one.")


def warn_of_smoothing(config: Any, names: list[str], smoothed: Collection[str]) -> None:
    """Warn of a `label_smoothing` that no loss of the run reads."""
    if not set(smoothed).intersection(names):
        logger.warning(
            f"label_smoothing={config.label_smoothing} has no effect on loss_type {', '.join(names)}: only "
            f"{', '.join(sorted(smoothed))} read it. Remove it."
        )
