"""`APOConfig`, and the checks of settings that need no model and no data."""

import re
from dataclasses import dataclass, field
from typing import Any

import transformers
from packaging.version import Version
from trl import DPOConfig

from apo_trl.errors import InputError, nearest
from apo_trl.losses import LOSSES

__all__ = [
    "ADDED_LOSSES", "SMOOTHED_LOSSES", "TRL_LOSSES", "APOConfig", "check_config", "groups_prompts",
    "keeps_degenerate_pairs", "loss_names",
]  # fmt: skip

_LISTED = re.findall(r"'(\w+)'", DPOConfig.__dataclass_fields__["loss_type"].metadata["help"])

TRL_LOSSES: tuple[str, ...] = tuple(
    dict.fromkeys((
        "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
        "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm", *_LISTED,
    ))
)  # fmt: skip
"""The losses of TRL 1.16, and those that the installed TRL lists in the help of `loss_type`."""

ADDED_LOSSES = {name: loss for name, loss in LOSSES.items() if name not in TRL_LOSSES}
"""The losses that this package computes. TRL computes a loss that both have."""

SMOOTHED_LOSSES = {"exo_pair", "robust", "aot", "aot_unpaired"}
"""The losses that read `label_smoothing`."""


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class APOConfig(DPOConfig):
    """`trl.DPOConfig` with APO as the default loss, and the options of this package.

    Args:
        loss_type (`list[str]`, *optional*, defaults to `["apo_zero"]`):
            Losses of `apo_trl.LOSSES` or of TRL, summed with the weights in `loss_weights`.
        padding_free (`bool`, *optional*, defaults to `True`):
            Compute each distinct token of a batch once: no padding, and every shared prefix a single time. Exact.
            Unsupported models fall back to padded batches, with a warning.
        group_by_prompt (`bool`, *optional*, defaults to `False`):
            Put pairs of one prompt into one batch, so that `padding_free` computes their prompt once.
        balance_tokens (`bool`, *optional*, defaults to `True`):
            With `padding_free`, distribute the pairs of each optimizer step over processes and micro-steps by their
            number of distinct tokens. Every step keeps its pairs, so losses and weights stay the same.
        keep_degenerate_pairs (`bool`, *optional*, defaults to `False`):
            Keep degenerate pairs: chosen equals rejected, before or after truncation, or a completion is empty.
        ref_cache_dir (`str`, *optional*):
            Folder of the cache for `precompute_ref_log_probs`. Default: `apo-trl` in the cache of `datasets`.

    Raises `InputError` for an unknown loss, and for settings that rule it out.
    """

    loss_type: list[str] = field(
        default_factory=lambda: ["apo_zero"],
        metadata={
            "help": "one or several losses, summed with the weights in `loss_weights`. "
            f"Of apo-trl: {', '.join(map(repr, ADDED_LOSSES))}. Of TRL: {', '.join(map(repr, TRL_LOSSES))}."
        },
    )
    padding_free: bool = _option(True, "compute each distinct token of a batch once, without padding; exact")
    group_by_prompt: bool = _option(False, "put pairs of one prompt into one batch, to compute their prompt once")
    balance_tokens: bool = _option(
        True, "with padding_free, distribute the pairs of a step over processes and micro-steps by their tokens"
    )
    keep_degenerate_pairs: bool = _option(False, "keep degenerate pairs, such as chosen equal to rejected")
    ref_cache_dir: str | None = _option(None, "folder of the cache for precompute_ref_log_probs")

    def __post_init__(self) -> None:
        check_config(self)
        super().__post_init__()


def check_config(config: DPOConfig) -> None:
    """Raise InputError if a loss is unknown, or conflicts with another setting."""
    names = loss_names(config)
    known = [*ADDED_LOSSES, *TRL_LOSSES]
    if not names:
        raise InputError(f"loss_type: required, got an empty list. Use one or more of {', '.join(known)}.")
    for name in names:
        if name not in known:
            raise InputError(f"loss_type: '{name}' is unknown.{nearest(name, known)} Use one of {', '.join(known)}.")
        for option, default in (("f_divergence_type", "reverse_kl"), ("use_weighting", False)):
            if name in ADDED_LOSSES and (value := getattr(config, option)) != default:
                fault = f"{option}: {value!r} is not supported with loss_type '{name}'"
                raise InputError(f"{fault}. Set it to {default!r}.")
    if config.loss_weights and len(config.loss_weights) != len(names):
        raise InputError(
            f"loss_weights: must have one weight for each of the {len(names)} losses in loss_type "
            f"({', '.join(names)}), got {len(config.loss_weights)}. Add or remove weights."
        )
    if groups_prompts(config) and (other := _other_order(config)):
        raise InputError(f"group_by_prompt: conflicts with {other}: both set the sampling order. Unset one.")


def _other_order(config: DPOConfig) -> str:
    """Return the setting of transformers that orders the rows, or an empty string if the order is random."""
    if Version(transformers.__version__) < Version("5"):  # goes when that is the floor
        return "group_by_length=True" if config.group_by_length else ""
    strategy = config.train_sampling_strategy
    return "" if strategy == "random" else f"train_sampling_strategy='{strategy}'"


def groups_prompts(config: DPOConfig | None) -> bool:
    """Return whether pairs of one prompt share a batch."""
    return isinstance(config, APOConfig) and config.group_by_prompt


def keeps_degenerate_pairs(config: DPOConfig | None) -> bool:
    """Return whether degenerate pairs stay in the dataset."""
    return isinstance(config, APOConfig) and config.keep_degenerate_pairs


def loss_names(config: DPOConfig) -> list[str]:
    """Return the losses of a configuration, also if `loss_type` was set to a single name later."""
    return [config.loss_type] if isinstance(config.loss_type, str) else list(config.loss_type)
