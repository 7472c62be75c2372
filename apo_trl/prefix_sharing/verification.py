"""The comparison of packed and padded log-probs, for an architecture that the tests do not cover."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from apo_trl.io.error_text import one_line
from apo_trl.prefix_sharing.forward import NO_INTERFACE, packed_forward, unpack
from apo_trl.prefix_sharing.layout import PackedBatch, pack

__all__ = ["mismatch_reason"]

# Nats: the largest and the mean difference of log-probs, by the precision in which attention was computed.
_TOLERANCES = {
    torch.float64: (1e-4, 1e-5),
    torch.float32: (1e-4, 1e-5),
    torch.float16: (0.1, 0.01),
    torch.bfloat16: (0.5, 0.05),
}


def mismatch_reason(
    packed: PackedBatch | None,
    fused: Callable[..., Any],
    padded: Callable[[], Any],
    labels: Tensor,
    config: Any,
) -> str:
    """Return why a model cannot train on packed batches, or an empty string, from two forwards in every process."""
    with torch.no_grad():
        if packed is None:  # nothing to compare in this batch
            ids = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 6]], device=labels.device)
            labels = ids
            packed = pack(ids, None, ids)
            assert packed is not None
            expected = fused(input_ids=ids, labels=ids, use_cache=False, fused_lm_head=True).log_probs
        else:
            expected = padded().log_probs
        packed = packed.to(labels.device)
        try:
            log_probs = unpack(packed_forward(fused, packed), packed, labels).log_probs
        except (TypeError, ValueError, RuntimeError) as error:
            return f"the model cannot take a packed batch ({one_line(error)})"
    if not packed.attention_calls:
        return NO_INTERFACE
    difference = (log_probs - expected).abs()
    largest, mean = difference.max().item(), difference.sum().item() / len(packed.label_index)
    if not (largest <= _TOLERANCES[packed.dtype][0] and mean <= _TOLERANCES[packed.dtype][1]):
        return f"log-probs of the first batch differ from the padded batch's by up to {largest:.1e}"
    if _sliding_window(config) != packed.sliding_window:  # a batch of short rows does not show it
        return "only the model's mask knows its sliding window"
    return ""


def _sliding_window(config: Any) -> int | None:
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    return getattr(config, "sliding_window", None) if "sliding_attention" in kinds else None
