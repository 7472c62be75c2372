"""Whether training moved a model away from its reference, by more than the rounding of bfloat16."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

__all__ = ["THRESHOLD", "hardly_moved", "hardly_moved_after", "hardly_moved_by_log", "loses_updates", "movement_of"]

THRESHOLD = 0.05
"""In nats per square root of a token: above the rounding of bfloat16, which grows like that (docs/metrics.md)."""


def movement_of(pairs: Iterable[Mapping[str, Any]]) -> float:
    """Compute how far the answers of evaluated pairs moved: the mean of `|log-ratio| / sqrt(tokens)`, in nats."""
    sides = [(pair, side) for pair in pairs for side in ("chosen", "rejected")]
    return _movement(*([pair[f"{side}_logratio{unit}"] for pair, side in sides] for unit in ("", "_per_token")))


def _movement(logratios: Any, per_token: Any) -> float:
    return float(np.sqrt(np.abs(np.asarray(logratios, dtype=float) * np.asarray(per_token, dtype=float))).mean())


def hardly_moved(moved: float, *, learning_rate: Any = None, steps: Any = None) -> str:
    """Return a sentence with what to change if `moved` is below the threshold, else an empty string."""
    if not moved < THRESHOLD:
        return ""
    rate, length = (f" (now {value:g})" if isinstance(value, (int, float)) else "" for value in (learning_rate, steps))
    return (
        f"Hardly moved: log-ratios are {moved:.2g} nats per square root of a token, below {THRESHOLD}. Shares of pairs"
        f" mean little. Increase learning_rate{rate} or max_steps{length}."
    )


def hardly_moved_after(trainer: Any) -> str:
    """Return the sentence of `hardly_moved` for a trainer that has trained."""
    now = {"learning_rate": trainer.args.learning_rate, "steps": trainer.state.global_step}
    return hardly_moved_by_log(trainer.state.log_history, beta=trainer.args.beta, **now)


def hardly_moved_by_log(entries: Iterable[Mapping[str, Any]], *, beta: Any, **now: Any) -> str:
    """Return the sentence of `hardly_moved` for the furthest of the means that a run logged; `now` is passed on."""
    keys = [
        name.format(side) for name in ("rewards/{}", "apo/{}_logratio_per_token") for side in ("chosen", "rejected")
    ]
    moved = []
    for entry in entries:
        for prefix in {key.removesuffix(keys[0]) for key in entry if key.endswith(keys[0])}:
            if beta and all(prefix + key in entry for key in keys):
                values = [entry[prefix + key] for key in keys]
                moved.append(_movement(np.array(values[:2]) / beta, values[2:]))
    return hardly_moved(max(moved), **now) if moved else ""


def loses_updates(trainer: Any) -> str:
    """Return a warning if whole weights in bfloat16 train without a copy in float32, else an empty string."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or hasattr(model, "peft_config"):
        return ""
    if not any(str(weight.dtype) == "torch.bfloat16" for weight in model.parameters() if weight.requires_grad):
        return ""
    return (
        "dtype: weights in bfloat16 are trained without a copy in float32, so at small learning rates rounding loses "
        "most updates. Train float32 weights (the default), or use LoRA, DeepSpeed or FSDP."
    )
