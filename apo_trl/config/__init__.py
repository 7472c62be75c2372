"""`APOConfig`, and the checks of settings that need no model and no data."""

import re
from dataclasses import dataclass, field
from typing import Any, get_args, get_type_hints

from pydantic import ConfigDict, Field, ValidationError, create_model
from transformers.utils import is_torch_bf16_gpu_available
from trl import DPOConfig

from apo_trl.losses import LOSSES

__all__ = ["ADDED_LOSSES", "SMOOTHED_LOSSES", "TRL_LOSSES", "APOConfig", "check_config", "has_option", "loss_names"]

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


_POSITIVE = ("beta", "max_length", "gradient_accumulation_steps", "per_device_train_batch_size")
_BOUNDS: dict[str, Any] = dict.fromkeys((*_POSITIVE, "per_device_eval_batch_size"), Field(None, gt=0))
_BOUNDS |= dict.fromkeys(("learning_rate", "weight_decay", "warmup_steps"), Field(None, ge=0))
_BOUNDS["label_smoothing"] = Field(None, ge=0, lt=0.5)
_CHECKED: dict[str, Any] = {
    name: (hint, _BOUNDS.get(name))
    for name, hint in get_type_hints(APOConfig).items()
    if str not in get_args(hint) and not {float, int, bool, list[float]}.isdisjoint((hint, *get_args(hint)))
}
_TRUNCATION = ("keep_start", "keep_end")
_Values = create_model("_Values", __config__=ConfigDict(strict=True, allow_inf_nan=False), **_CHECKED)


def check_config(config: DPOConfig) -> None:
    """Check settings, and turn off the bfloat16 that TRL sets by default if the machine cannot compute it.

    Raises InputError for an unknown loss, for a value of the wrong type or out of its bounds, and for a conflict.
    """
    try:
        _Values.model_validate(vars(config))
    except ValidationError as error:
        from apo_trl.config.conflicts import check_value

        check_value(config, error)
    names, known = loss_names(config), [*ADDED_LOSSES, *TRL_LOSSES]
    of_losses = config.loss_weights or config.use_weighting or config.f_divergence_type != "reverse_kl"
    if of_losses or not names or not set(known).issuperset(names) or config.truncation_mode not in _TRUNCATION:
        from apo_trl.config.conflicts import check_names

        check_names(config, names, ADDED_LOSSES, known, _TRUNCATION)
    if has_option(config, "group_by_prompt"):
        from apo_trl.config.conflicts import check_order

        check_order(config)
    if not config.use_cpu and config.bf16 is not False and not is_torch_bf16_gpu_available():
        from apo_trl.config.cpu import choose_precision

        choose_precision(config)


def has_option(config: DPOConfig | None, name: str) -> bool:
    """Return whether an option that `APOConfig` adds is on."""
    return isinstance(config, APOConfig) and bool(getattr(config, name))


def loss_names(config: DPOConfig) -> list[str]:
    """Return the losses of a configuration, also if `loss_type` was set to a single name later."""
    return [config.loss_type] if isinstance(config.loss_type, str) else list(config.loss_type)
