"""The forward of a packed batch, and its outputs in the layout that TRL expects."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from apo_trl.prefix_sharing.attention import gather
from apo_trl.prefix_sharing.layout import PackedBatch

__all__ = ["NO_INTERFACE", "keep_questions", "packed_forward", "unpack"]

NO_INTERFACE = "the model's attention is not called through transformers' AttentionInterface"
_SCORES = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def packed_forward(fused: Callable[..., Any], packed: PackedBatch) -> Any:
    """Compute a packed batch by the forward that TRL has patched."""
    packed.attention_calls = 0
    return fused(
        input_ids=packed.input_ids,
        # A mask of four dimensions is passed on as it is, and attention does not read it.
        attention_mask=torch.zeros(1, 1, 1, 1, device=packed.input_ids.device),
        position_ids=packed.position_ids,
        shift_labels=packed.targets,
        packed_batch=packed,
        fused_lm_head=True,
    )


def keep_questions(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Pass the head only the positions at which something is scored: a forward hook of the backbone."""
    packed = kwargs.get("packed_batch")
    if packed is not None:
        hidden = output.last_hidden_state[0]
        output.last_hidden_state = gather(hidden, packed.question_index.to(hidden.device))[None]
    return output


def unpack(outputs: Any, packed: PackedBatch, labels: Tensor) -> Any:
    """Scatter the head's output of each question into the layout of TRL, shapes (rows, T - 1)."""
    rows, width = packed.shape
    for name in _SCORES:
        values = getattr(outputs, name)
        if values is not None:
            empty = values.new_zeros(rows * (width - 1))
            answers = values[0].index_select(0, packed.answer_index.to(values.device))
            scattered = empty.index_copy(0, packed.label_index.to(values.device), answers)
            setattr(outputs, name, scattered.view(rows, width - 1))
    outputs.label_mask = labels[:, 1:] != -100
    outputs.loss = -outputs.log_probs.sum() / outputs.label_mask.sum().clamp(min=1)
    return outputs
