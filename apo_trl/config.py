"""`APOConfig`, and what can be said of settings before anything is loaded."""

import re
from dataclasses import dataclass, field

import transformers
from packaging.version import Version
from trl import DPOConfig

from apo_trl.errors import InputError, nearest
from apo_trl.losses import LOSSES

__all__ = [
    "ADDED_LOSSES",
    "BATCH_LOSSES",
    "SMOOTHED_LOSSES",
    "TRL_LOSSES",
    "APOConfig",
    "balances_tokens",
    "check_config",
    "groups_prompts",
    "keeps_degenerate_pairs",
    "loss_names",
]

TRL_LOSSES: tuple[str, ...] = tuple(
    re.findall(r"'(\w+)'", DPOConfig.__dataclass_fields__["loss_type"].metadata["help"])
)
"""The losses of the installed TRL, read from the only place where it lists them outside of a method."""

ADDED_LOSSES = {name: loss for name, loss in LOSSES.items() if name not in TRL_LOSSES}
"""The losses that this package adds. A name that TRL has too is TRL's."""

SMOOTHED_LOSSES = {"exo_pair", "robust", "aot", "aot_unpaired"}
"""The losses that read `label_smoothing`."""

BATCH_LOSSES = {"aot", "aot_unpaired", "sft"}
"""The losses that depend on which pairs share a micro-batch: they sort it, or average over its tokens."""


@dataclass
class APOConfig(DPOConfig):
    """`trl.DPOConfig` with APO as the default loss and the options that only this package has.

    Args:
        loss_type (`list[str]`, *optional*, defaults to `["apo_zero"]`):
            Any mixture of the names in `apo_trl.LOSSES` and those of TRL, weighted by `loss_weights`.
        padding_free (`bool`, *optional*, defaults to `True`):
            Compute each distinct token of a batch once: without padding, and every prefix that rows share a single
            time. Exact. A model that cannot be served so trains with padding, with a warning that says why.
        group_by_prompt (`bool`, *optional*, defaults to `False`):
            Let pairs of one prompt meet in one batch, where `padding_free` computes their prompt, and answers that
            they share, once. Every batch is as large as before and every row comes once an epoch.
        balance_tokens (`bool`, *optional*, defaults to `True`):
            With `padding_free`, spread the pairs of each optimizer step over processes and micro-steps such that all
            compute nearly the same number of distinct tokens. Every step keeps its pairs, so losses and weights stay
            the same. No effect with one process that computes one batch a step.
        keep_degenerate_pairs (`bool`, *optional*, defaults to `False`):
            Keep pairs that can teach nothing (chosen equals rejected, before or after truncation, or a completion is
            empty) instead of leaving them out with a warning that counts them.
        ref_cache_dir (`str`, *optional*):
            Folder in which `precompute_ref_log_probs` keeps the reference's log-probs, one file per reference. By
            default `apo-trl` in the cache of `datasets`.

    Raises `InputError` (a `ValueError`) where a loss does not exist or cannot work with the other settings.
    """

    loss_type: list[str] = field(
        default_factory=lambda: ["apo_zero"],
        metadata={
            "help": "Loss, or several to be summed with the weights in `loss_weights`. "
            f"Of apo-trl: {', '.join(repr(name) for name in ADDED_LOSSES)}. "
            f"Of TRL: {', '.join(repr(name) for name in TRL_LOSSES)}."
        },
    )
    padding_free: bool = field(
        default=True,
        metadata={
            "help": "Compute each distinct token of a batch once: without padding, and every prefix that rows share a "
            "single time. Exact; a model that cannot be served so trains with padding, with a warning that says why."
        },
    )
    group_by_prompt: bool = field(
        default=False,
        metadata={
            "help": "Let pairs of one prompt meet in one batch, where padding_free computes their prompt, and answers "
            "that they share, once. Every batch is as large as before and every row comes once an epoch."
        },
    )
    balance_tokens: bool = field(
        default=True,
        metadata={
            "help": "With padding_free, spread the pairs of each optimizer step over processes and micro-steps such "
            "that all compute nearly the same number of distinct tokens. Every step keeps its pairs, so losses and "
            "weights stay the same. No effect with one process that computes one batch a step."
        },
    )
    keep_degenerate_pairs: bool = field(
        default=False,
        metadata={
            "help": "Keep pairs that can teach nothing (chosen equals rejected, before or after truncation, or a "
            "completion is empty) instead of leaving them out with a warning that counts them."
        },
    )
    ref_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder in which `precompute_ref_log_probs` keeps the reference's log-probs, one file per "
            "reference. By default `apo-trl` in the cache of `datasets`."
        },
    )

    def __post_init__(self) -> None:
        check_config(self)
        super().__post_init__()


def check_config(config: DPOConfig) -> None:
    """Raise InputError for a loss that does not exist, or that the other settings of `config` rule out."""
    names = loss_names(config)
    known = [*ADDED_LOSSES, *TRL_LOSSES]
    if not names:
        raise InputError(f"loss_type is empty; name at least one of {', '.join(known)}.")
    for name in names:
        if name not in known:
            raise InputError(f"loss_type '{name}' does not exist.{nearest(name, known)} Known are {', '.join(known)}.")
    if config.loss_weights and len(config.loss_weights) != len(names):
        raise InputError(
            f"loss_weights has {len(config.loss_weights)} values for the {len(names)} losses in loss_type "
            f"({', '.join(names)}); give one weight for each loss."
        )
    for name in names:
        if name in ADDED_LOSSES and config.f_divergence_type != "reverse_kl":
            raise InputError(
                f"f_divergence_type='{config.f_divergence_type}' has no meaning for loss_type '{name}', which is "
                "anchored to log-ratios; set f_divergence_type='reverse_kl'."
            )
        if name in ADDED_LOSSES and config.use_weighting:
            raise InputError(
                f"use_weighting=True is not defined for loss_type '{name}'; set use_weighting=False or choose among "
                f"{', '.join(TRL_LOSSES)}."
            )
    if groups_prompts(config) and _other_order(config):
        raise InputError(
            f"group_by_prompt=True and {_other_order(config)} each want an order of their own; leave one of them out."
        )


def _other_order(config: DPOConfig) -> str:
    """Name the setting of the host that decides the order of rows, or nothing where that is random."""
    if Version(transformers.__version__) < Version("5"):  # goes when that is the floor
        return "group_by_length=True" if config.group_by_length else ""
    strategy = config.train_sampling_strategy
    return "" if strategy == "random" else f"train_sampling_strategy='{strategy}'"


def groups_prompts(config: DPOConfig | None) -> bool:
    """Say whether the user asked for pairs of one prompt in one batch."""
    return isinstance(config, APOConfig) and config.group_by_prompt


def balances_tokens(config: DPOConfig) -> bool:
    """Return whether the pairs of an optimizer step may be spread over its micro-batches by their tokens."""
    wanted = isinstance(config, APOConfig) and config.balance_tokens and config.padding_free
    return wanted and not BATCH_LOSSES.intersection(loss_names(config))


def keeps_degenerate_pairs(config: DPOConfig | None) -> bool:
    """Say whether the user asked to keep pairs that can teach nothing."""
    return isinstance(config, APOConfig) and config.keep_degenerate_pairs


def loss_names(config: DPOConfig) -> list[str]:
    """Give the losses of a configuration, also where `loss_type` was set to a single name later."""
    return [config.loss_type] if isinstance(config.loss_type, str) else list(config.loss_type)
