"""Attention over a packed batch: each row's added tokens attend to its whole path.

Keys and values of all paths are gathered by one index. Flash kernels align causal masks at the lower right, as a path
requires, so one variable-length call computes a layer; without a flash kernel, SDPA is called for each row.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_flash_attention_utils import flash_attn_supports_top_left_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from apo_trl.prefix_sharing.layout import PackedBatch

__all__ = ["gather", "install", "supports_packing"]

_EAGER = "prefix_sharing_eager"


def supports_packing(implementation: str) -> bool:
    """Return whether an attention implementation of transformers can compute a packed batch."""
    if implementation in ("sdpa", "eager", _EAGER):
        return True
    function = ALL_ATTENTION_FUNCTIONS.get(implementation)
    is_flash = getattr(function, "__wrapped__", function) is flash_attention_forward  # of a package or a hub kernel
    return is_flash and not flash_attn_supports_top_left_mask()


def install(implementation: str) -> str:
    """Wrap an attention implementation to compute packed batches, and return its name from now on.

    Calls without a layout reach it as before. Eager attention is not registered and gets a name of its own.
    Transformers registers a hub kernel again whenever it changes, so that one is set on the interface itself, too.
    """
    name = _EAGER if implementation == "eager" else implementation
    function = _eager if name == _EAGER else ALL_ATTENTION_FUNCTIONS[name]
    if name == _EAGER:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    if not hasattr(function, "_computes_packed_batches"):
        packing = _packing(function)
        AttentionInterface.register(name, packing)
        if "/" in name:
            ALL_ATTENTION_FUNCTIONS[name] = packing
    return name


def _eager(module: Any, *args: Any, **kwargs: Any) -> Any:
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)


def _packing(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        packed = kwargs.pop("packed_batch", None)
        if packed is None:
            return function(module, query, key, value, attention_mask, **kwargs)
        return _attend(function, module, query, key, value, attention_mask, packed, **kwargs)

    attention._computes_packed_batches = True  # type: ignore[attr-defined]
    return attention


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend(
    function: Callable[..., Any],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    packed: PackedBatch,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend from (1, heads, P, size) to (1, P, heads, size)."""
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"its attention uses {name}")
    if dropout:
        raise ValueError("its attention has dropout")
    if attention_mask is not None and attention_mask.numel() > 1:  # not the one that the model was given
        raise ValueError("its attention makes a mask of its own")
    if sliding_window is not None:
        packed.sliding_window = sliding_window
        sliding_window = sliding_window if sliding_window < packed.max_length_k else None
    packed = packed.to(query.device)  # the layers of one model may be on several
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    query, key, value = (tensor.transpose(1, 2)[0].to(dtype) for tensor in (query, key, value))
    keys, values = (gather(tensor, packed.gather_index) for tensor in (key, value))
    kernel, attend = _kernel(function, query, keys, values)
    packed.attention_calls += 1
    packed.kernel, packed.dtype = kernel, dtype
    return attend(query, keys, values, packed, scaling, sliding_window, module)[None], None


def _kernel(function: Any, query: Tensor, keys: Tensor, values: Tensor) -> tuple[str, Callable[..., Tensor]]:
    """Return the best kernel for these tensors: the model's own flash attention, torch's `varlen_attn`, or SDPA.

    It maps queries (P, heads, size), keys and values (K, key heads, size) to outputs (P, heads, value size).
    """
    size, low_precision = query.size(-1), query.dtype in (torch.bfloat16, torch.float16)
    flash_sizes = size == keys.size(-1) == values.size(-1) <= 256 and size % 8 == 0
    if function is flash_attention_forward or (query.is_cuda and low_precision and flash_sizes):
        from apo_trl.prefix_sharing import flash

        if function is flash_attention_forward:
            return "flash", flash.flash_attention
        if flash.varlen_attn() is not None:
            return "varlen", flash.varlen_attention
    from apo_trl.prefix_sharing.sdpa import split_attention

    return "sdpa", split_attention


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = source.shape
        return source.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = grad.new_zeros(ctx.shape, dtype=wide).index_add_(0, index, grad.to(wide))
        return total.to(grad.dtype), None


def gather(source: Tensor, index: Tensor) -> Tensor:
    """Select rows of the first dimension; gradients of a repeated row are summed in float32."""
    result: Tensor = _Gather.apply(source, index)  # type: ignore[no-untyped-call]
    return result
