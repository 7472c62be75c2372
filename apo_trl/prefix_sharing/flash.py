"""Attention over a packed batch by one variable-length call of a flash kernel."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.flash_attention import flash_attention_forward

from apo_trl.prefix_sharing.layout import PackedBatch

__all__ = ["flash_attention", "varlen_attention", "varlen_attn"]


def flash_attention(
    query: Tensor, keys: Tensor, values: Tensor, packed: PackedBatch, scale: Any, window: int | None, module: Any
) -> Tensor:
    """Attend by transformers' flash attention, with the kernel of the model."""
    output: Tensor = flash_attention_forward(
        module,
        *(tensor.transpose(0, 1)[None] for tensor in (query, keys, values)),
        attention_mask=None,
        scaling=scale,
        sliding_window=window,
        is_causal=True,
        cu_seq_lens_q=packed.cu_seq_lens_q,
        cu_seq_lens_k=packed.cu_seq_lens_k,
        max_length_q=packed.max_length_q,
        max_length_k=packed.max_length_k,
    )[0]
    return output[0]


@functools.cache
def varlen_attn() -> tuple[Callable[..., Any], dict[str, Any]] | None:
    """Return torch's variable-length attention and its argument for grouped heads, or None if torch is too old."""
    try:
        from torch.nn.attention import varlen
    except ImportError:
        return None
    parameters = inspect.signature(varlen.varlen_attn).parameters
    if not {"scale", "window_size"} <= set(parameters) or torch.cuda.get_device_capability() < (8, 0):
        return None
    return varlen.varlen_attn, {"enable_gqa": True} if "enable_gqa" in parameters else {}


def varlen_attention(
    query: Tensor, keys: Tensor, values: Tensor, packed: PackedBatch, scale: Any, window: int | None, module: Any
) -> Tensor:
    """Attend by torch's variable-length attention."""
    function, grouped = varlen_attn() or (None, {})
    assert function is not None
    output: Tensor = function(
        query, keys, values, packed.cu_seq_lens_q, packed.cu_seq_lens_k, packed.max_length_q, packed.max_length_k,
        scale=scale, window_size=(-1 if window is None else window - 1, 0), **grouped,
    )  # fmt: skip
    return output
