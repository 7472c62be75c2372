"""Attention over a packed batch: each row's added tokens attend to its whole path, by one call a layer.

Keys and values of every path are gathered by one index. Flash kernels align causal masks at the lower right, which is
what a path needs, so one variable-length call does a layer; without one, SDPA is called for each row.
"""

import functools
import inspect
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
from apo_trl.prefix_sharing.sdpa import split_attention

__all__ = ["install", "kernel_name", "supports_packing"]

_EAGER = "prefix_sharing_eager"


def supports_packing(implementation: str) -> bool:
    """Return whether an attention implementation of transformers can compute a packed batch."""
    return implementation in ("sdpa", "eager", _EAGER) or _is_flash(implementation)


def _is_flash(implementation: str) -> bool:
    """Return whether it is transformers' flash attention, by a package or by a hub kernel."""
    function = ALL_ATTENTION_FUNCTIONS.get(implementation)
    is_flash = getattr(function, "__wrapped__", function) is flash_attention_forward
    return is_flash and not flash_attn_supports_top_left_mask()


def install(implementation: str) -> str:
    """Let an attention implementation compute packed batches, and return the name under which it does.

    The registered function is wrapped: a call without a layout goes to it as before, so a model keeps its name, and
    what depends on that name. Eager attention is no registered function and gets a name of its own.

    Transformers registers a hub kernel anew whenever the kernel it calls changes, also in the middle of a forward. It
    then registers the same function, and what is set on the interface itself goes before what is registered.
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
    kernel = kernel_name(function, query, keys, values)
    packed.attention_calls += 1
    packed.kernel, packed.dtype = kernel, dtype
    return KERNELS[kernel](module, query, keys, values, packed, scaling, sliding_window)[None], None


def kernel_name(function: Callable[..., Any], query: Tensor, keys: Tensor, values: Tensor) -> str:
    """Return which of `KERNELS` computes these tensors: the model's own flash attention, torch's, or SDPA by rows."""
    if function is flash_attention_forward:
        return "flash"
    size = query.size(-1)
    flash_sizes = size == keys.size(-1) == values.size(-1) <= 256 and size % 8 == 0
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and flash_sizes and _varlen_attn() is not None:
        return "varlen"
    return "sdpa"


# Rows by index. The gradient of a row that is gathered several times is summed in float32.


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


# The kernels: queries (P, heads, size), keys and values (K, key heads, size) to (P, heads, value size).


def _flash(
    module: Any, query: Tensor, keys: Tensor, values: Tensor, packed: PackedBatch, scale: Any, window: int | None
) -> Tensor:
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
def _varlen_attn() -> tuple[Callable[..., Any], dict[str, Any]] | None:
    """Return torch's variable-length attention with what it wants to know of grouped heads, or None in older torch."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    parameters = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= set(parameters) or torch.cuda.get_device_capability() < (8, 0):
        return None
    return varlen_attn, {"enable_gqa": True} if "enable_gqa" in parameters else {}


def _varlen(
    module: Any, query: Tensor, keys: Tensor, values: Tensor, packed: PackedBatch, scale: Any, window: int | None
) -> Tensor:
    found = _varlen_attn()
    assert found is not None
    function, grouped = found
    output: Tensor = function(
        query, keys, values, packed.cu_seq_lens_q, packed.cu_seq_lens_k, packed.max_length_q, packed.max_length_k,
        scale=scale, window_size=(-1 if window is None else window - 1, 0), **grouped,
    )  # fmt: skip
    return output


def _sdpa(
    module: Any, query: Tensor, keys: Tensor, values: Tensor, packed: PackedBatch, scale: Any, window: int | None
) -> Tensor:
    return split_attention(query, keys, values, packed, scale, window)


KERNELS: dict[str, Callable[..., Tensor]] = {"flash": _flash, "varlen": _varlen, "sdpa": _sdpa}
"""The ways to attend, best first: transformers' flash attention, torch's `varlen_attn`, SDPA for each row."""
