"""Settings of a run on a machine without a GPU, for which TRL's defaults are not made."""

import logging
from typing import Any

import torch
from transformers.utils import is_torch_xla_available

from apo_trl.errors import InputError

__all__ = ["adapt_to_cpu", "choose_precision"]

logger = logging.getLogger(__name__)


def choose_precision(config: Any) -> None:
    """Turn off the bfloat16 that TRL sets by default; raise InputError if it is set explicitly."""
    if is_torch_xla_available() or (config.bf16 is None and config.fp16):
        return
    if config.bf16:
        remedy = "Remove it to train in float32, or set use_cpu too, for bfloat16 on the CPU"
        raise InputError(f"bf16: requires a GPU that computes bfloat16, none found. {remedy}.")
    config.bf16 = False
    logger.warning("No GPU that computes bfloat16 found: bf16 is off.")


def adapt_to_cpu(options: Any) -> None:
    """Change the options of a command line to what runs on a CPU, and log it, if this machine has nothing else."""
    if getattr(torch, "accelerator", torch.cuda).is_available() or options.use_cpu:  # older torch has only torch.cuda
        return
    changes = {"use_cpu": True, "bf16": False}
    changes |= {name: False for name in ("fp16", "tf32", "bf16_full_eval", "fp16_full_eval") if getattr(options, name)}
    changed = ", ".join(f"{name}: {str(value).lower()}" for name, value in changes.items())
    if "flash" in (options.attn_implementation or ""):
        options.attn_implementation = "sdpa"
        changed += ", attn_implementation: sdpa"
    vars(options).update(changes)
    logger.info(f"No GPU found, training on the CPU ({changed}).")
