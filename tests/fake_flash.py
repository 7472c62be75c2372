"""A stand-in for FlashAttention on a CPU: transformers finds it installed, and it computes in plain PyTorch.

`installed()` undoes itself; `install()` lasts: `python -c "import fake_flash; fake_flash.install(); ..."`.
Each call of a variable-length function is checked as the real one checks it, and recorded in `CALLS`.
"""

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

PACKAGES = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
KERNELS = ("kernels-community/flash-attn2", "kernels-community/flash-attn3", "kernels-community/vllm-flash-attn3")

CALLS: list[dict[str, Any]] = []
"""What the variable-length functions were given since it was last cleared."""


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, window: Any) -> Tensor:
    """Attend within one sequence: (queries, heads, size) to (keys, key heads, size), aligned at the lower right."""
    k, v = (tensor.repeat_interleave(q.size(1) // k.size(1), 1) for tensor in (k, v))
    left, right = (-1, -1) if window is None else (-1 if side is None else side for side in window)
    if causal:
        right = 0
    own = torch.arange(q.size(0))[:, None] + k.size(0) - q.size(0)
    key = torch.arange(k.size(0))[None]
    seen = torch.ones(q.size(0), k.size(0), dtype=torch.bool)
    if left >= 0:
        seen &= key >= own - left
    if right >= 0:
        seen &= key <= own + right
    scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * (q.size(-1) ** -0.5 if scale is None else scale)
    weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), -1)
    return torch.einsum("hqk,khd->qhd", weights, v.float()).to(q.dtype)


def attend_varlen(
    name: str, q: Tensor, k: Tensor, v: Tensor, offsets_q: Tensor, offsets_k: Tensor, max_q: Any, max_k: Any,
    scale: float | None, causal: bool, window: Any, softcap: float = 0.0, dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """Attend within each sequence, from exactly the tensors and offsets that the kernel would get."""
    assert softcap == dropout == 0
    assert q.dtype == k.dtype == v.dtype
    assert q.dim() == k.dim() == v.dim() == 3
    assert q.size(2) == k.size(2) == v.size(2)
    assert k.shape == v.shape
    assert q.size(1) % k.size(1) == 0
    for offsets, tokens, longest in ((offsets_q, q.size(0), max_q), (offsets_k, k.size(0), max_k)):
        assert offsets.dtype == torch.int32
        assert offsets.is_contiguous()
        assert offsets[0] == 0
        assert offsets[-1] == tokens
        assert isinstance(longest, int)
        assert longest >= offsets.diff().max()
    assert len(offsets_q) == len(offsets_k)
    CALLS.append({
        "function": name, "dtype": q.dtype, "tokens": q.size(0), "offsets_q": offsets_q.tolist(),
        "offsets_k": offsets_k.tolist(), "window": window, "causal": causal,
    })  # fmt: skip
    rows_q, rows_k = offsets_q.diff().tolist(), offsets_k.diff().tolist()
    rows = zip(q.split(rows_q), k.split(rows_k), v.split(rows_k), strict=True)
    return torch.cat([attend(*row, scale, causal, window) for row in rows])


# The signatures are those of the real functions, as far as transformers looks at them.


def _flash_attention_2(name: str) -> dict[str, Any]:
    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False
    ):
        rows = zip(q, k, v, strict=True)
        return torch.stack([attend(*row, softmax_scale, causal, window_size) for row in rows])

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False,
    ):  # fmt: skip
        return attend_varlen(
            name, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size,
            softcap, dropout_p,
        )  # fmt: skip

    return _functions(flash_attn_func, flash_attn_varlen_func)


def _flash_attention_3(name: str) -> dict[str, Any]:
    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, qv=None, window_size=(-1, -1), softcap=0.0, deterministic=False
    ):
        rows = zip(q, k, v, strict=True)
        return torch.stack([attend(*row, softmax_scale, causal, window_size) for row in rows])

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, window_size=(-1, -1), softcap=0.0, deterministic=False,
    ):  # fmt: skip
        return attend_varlen(
            name, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size,
            softcap,
        )  # fmt: skip

    return _functions(flash_attn_func, flash_attn_varlen_func)


def _flash_attention_4(name: str) -> dict[str, Any]:
    """FA4 gives the log-sum-exp of its rows, too, and has no function for paged caches."""

    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0
    ):
        rows = zip(q, k, v, strict=True)
        return torch.stack([attend(*row, softmax_scale, causal, window_size) for row in rows]), None

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, seqused_q=None,
        seqused_k=None, page_table=None, softmax_scale=None, causal=False, window_size=(None, None),
        learnable_sink=None, softcap=0.0, deterministic=False,
    ):  # fmt: skip
        assert learnable_sink is None
        out = attend_varlen(
            name, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size,
            softcap,
        )  # fmt: skip
        return out, None

    return {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}


def _vllm_flash_attention_3(name: str) -> dict[str, Any]:
    """The order of arguments is another one."""

    def flash_attn_varlen_func(
        q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k=None, seqused_k=None, dropout_p=0.0,
        softmax_scale=None, causal=False, window_size=None, softcap=0.0, deterministic=False, block_table=None,
        s_aux=None,
    ):  # fmt: skip
        assert s_aux is block_table is None
        return attend_varlen(
            name, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size,
            softcap, dropout_p,
        )  # fmt: skip

    return _functions(_flash_attention_3(name)["flash_attn_func"], flash_attn_varlen_func)


def _functions(flash_attn_func: Any, flash_attn_varlen_func: Any) -> dict[str, Any]:
    def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, cache_seqlens=None, block_table=None, **_):
        raise AssertionError("no training reads a paged cache")

    return {
        "flash_attn_func": flash_attn_func,
        "flash_attn_varlen_func": flash_attn_varlen_func,
        "flash_attn_with_kvcache": flash_attn_with_kvcache,
    }


def _module(name: str, functions: dict[str, Any]) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(functions)
    return module


def _packages() -> dict[str, ModuleType]:
    from transformers.modeling_flash_attention_utils import _pad_input, _unpad_input

    padding = {"pad_input": _pad_input, "unpad_input": _unpad_input}
    return {
        "flash_attn": _module("flash_attn", _flash_attention_2("flash_attention_2")),
        "flash_attn.bert_padding": _module("flash_attn.bert_padding", padding),
        "flash_attn.cute": _module("flash_attn.cute", _flash_attention_4("flash_attention_4")),
        "flash_attn_interface": _module("flash_attn_interface", _flash_attention_3("flash_attention_3")),
    }


_HUB = dict(zip(KERNELS, (_flash_attention_2, _flash_attention_3, _vllm_flash_attention_3), strict=True))


def _get_kernel(repo: str, revision: Any = None, version: Any = None, allow_all_kernels: bool = False) -> ModuleType:
    return _module(repo, _HUB[repo](repo))


@contextlib.contextmanager
def installed(packages: bool = True) -> Iterator[None]:
    """Install the three packages, or only the `kernels` library; either way the hub has its kernels."""
    from transformers import AttentionInterface, AttentionMaskInterface, modeling_utils
    from transformers import modeling_flash_attention_utils as utils
    from transformers.integrations import hub_kernels

    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(patch.object(hub_kernels, "is_kernels_available", lambda: True))
        enter(patch.object(hub_kernels, "get_kernel", _get_kernel))
        if packages:
            enter(patch.dict(sys.modules, _packages()))
            for version in (2, 3, 4):
                enter(patch.object(utils, f"is_flash_attn_{version}_available", lambda **_: True))
                enter(
                    patch.dict(
                        utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX[version],
                        general_availability_check=lambda: True,
                        supported_devices=((lambda: True, "cpu"),),
                    )
                )
        else:
            enter(patch.object(modeling_utils, "is_kernels_available", lambda: True))
        # What transformers keeps of an implementation that it has loaded, and what is registered meanwhile.
        for name in (
            "_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn", "_pad_fn", "_unpad_fn",
            "_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn",
        ):  # fmt: skip
            enter(patch.object(utils, name, None))
        for interface in (AttentionInterface, AttentionMaskInterface):
            enter(patch.dict(interface._global_mapping))
        enter(patch.dict(modeling_utils.ALL_ATTENTION_FUNCTIONS._local_mapping))
        CALLS.clear()
        yield


_INSTALLED = contextlib.ExitStack()


def install() -> None:
    """Install the stand-in until this process ends."""
    _INSTALLED.enter_context(installed())
