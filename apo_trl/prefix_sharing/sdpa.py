"""SDPA for each row of a packed batch: attention without a flash kernel, on any device and in any precision.

Rows that share nothing are plainly causal; the others need a mask, which stays small for rows of any length.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import repeat_kv

from apo_trl.prefix_sharing.layout import PackedBatch

__all__ = ["split_attention"]

_MASK_ELEMENTS = 1 << 22
# Without cuDNN, which plans every new shape, and whose masked backward can be NaN (pytorch issue 196678).
_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def split_attention(
    query: Tensor, keys: Tensor, values: Tensor, packed: PackedBatch, scale: float | None, window: int | None, *_: Any
) -> Tensor:
    """Attend from queries (P, heads, size) to keys and values (K, key heads, size), row by row."""
    query, keys, values = (tensor.transpose(0, 1)[None] for tensor in (query, keys, values))
    if not (grouped := query.device.type == "cpu"):  # its kernel takes grouped heads, masked or not
        groups = query.size(1) // keys.size(1)
        keys, values = repeat_kv(keys, groups), repeat_kv(values, groups)
    key = (window, query.dtype, query.device)
    if key not in packed.plans:
        packed.plans[key] = Plan(packed, window, query)  # built once for all layers
    plan = packed.plans[key]
    rows = zip(
        plan.rows, torch.split(query, packed.query_lengths, 2), torch.split(keys, packed.key_lengths, 2),
        torch.split(values, packed.key_lengths, 2), strict=True,
    )  # fmt: skip
    outputs = []
    with sdpa_kernel(_BACKENDS) if query.is_cuda else contextlib.nullcontext():
        for blocks, added, path, contents in rows:
            for block in blocks:
                mask = plan.mask(block)
                output = scaled_dot_product_attention(
                    _narrow(added, block.start, block.stop),
                    _narrow(path, block.first, block.last),
                    _narrow(contents, block.first, block.last),
                    mask,
                    is_causal=mask is None and block.stop - block.start > 1,
                    scale=scale,
                    enable_gqa=grouped,
                )
                outputs.append(output)
    return torch.cat([output[0].transpose(0, 1) for output in outputs])  # as the kernels lay them out


def _narrow(tensor: Tensor, start: int, stop: int) -> Tensor:
    # Even a full slice copies in backward.
    return tensor if stop - start == tensor.size(2) else tensor[:, :, start:stop]


class Block(NamedTuple):
    """Queries [start, stop) of a row and the keys [first, last) of its path; the first sees keys up to `diagonal`."""

    start: int
    stop: int
    first: int
    last: int
    diagonal: int


class Plan:
    """Blocks of queries with small masks. A diagonal band is the same everywhere: all masks are slices of one."""

    def __init__(self, packed: PackedBatch, window: int | None, like: Tensor) -> None:
        self.window, self.device = window, like.device.type
        maskless = self.device == "cuda" and window is None  # its kernels align a causal mask at the lower right
        limit = packed.max_length_q if maskless else _largest_block(packed.max_length_k, window)
        self.rows = [
            list(self._blocks(queries, keys, limit))
            for queries, keys in zip(packed.query_lengths, packed.key_lengths, strict=True)
        ]
        masked = [block for blocks in self.rows for block in blocks if not self._plainly_causal(block)]
        self.centre = max((block.diagonal for block in masked), default=0)
        self.band: Tensor | None = None
        if masked and not maskless:
            height = max(block.stop - block.start for block in masked)
            seen = torch.ones(height, self.centre + height, dtype=torch.bool, device=like.device).tril_(self.centre)
            if window is not None:
                seen.triu_(self.centre - window + 1)
            self.band = torch.zeros_like(seen, dtype=like.dtype).masked_fill_(~seen, float("-inf"))

    def _blocks(self, queries: int, keys: int, limit: int) -> Iterator[Block]:
        depth, window = keys - queries, self.window
        if not depth and (window is None or window >= keys):
            limit = queries  # plainly causal
        for start in range(0, queries, limit):
            stop = min(start + limit, queries)
            first = 0 if window is None else max(0, depth + start - window + 1)
            yield Block(start, stop, first, depth + stop, depth + start - first)

    def _plainly_causal(self, block: Block) -> bool:
        queries, keys = block.stop - block.start, block.last - block.first
        return (queries == keys or queries == 1) and (self.window is None or self.window >= keys)

    def mask(self, block: Block) -> Any:
        """Return the mask to add to the scores of a block, or None for a plainly causal block."""
        if self._plainly_causal(block):
            return None
        queries, keys = block.stop - block.start, block.last - block.first
        if self.band is None:
            return causal_lower_right(queries, keys)
        left = self.centre - block.diagonal
        mask = self.band[:queries, left : left + keys]
        return mask if self.device == "cpu" else mask.contiguous()  # GPU kernels require aligned rows


def _largest_block(keys: int, window: int | None) -> int:
    """Return the number of queries with a mask of at most `_MASK_ELEMENTS`."""
    size = _MASK_ELEMENTS // keys
    if window is not None:  # a block of more queries than the window has less than twice as many keys
        size = max(size, min(_MASK_ELEMENTS // (2 * window), math.isqrt(_MASK_ELEMENTS // 2)))
    return max(1, size)
