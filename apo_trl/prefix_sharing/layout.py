"""The packed layout of a batch: each distinct token once, and the indices that attention and the head read.

The rows, sorted by their tokens, form a tree: each row adds the tokens after its longest common prefix with the row
before it. The added tokens of all rows are the packed sequence; a row's path is where its tokens are packed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["PackedBatch", "PackingCollator", "pack"]

Ints = NDArray[np.int64]


class PackedBatch:
    """The layout of one batch, with everything that a forward over its packed sequence needs.

    Sizes: `P` packed tokens, `N` rows that add tokens, `K` keys (the tokens of these rows' paths, one path after
    another), `S` distinct questions (a packed position and the token that comes next), `L` labelled positions.

    Attributes:
        input_ids, position_ids: Packed tokens, and the position of each in its own row, shape (1, P).
        gather_index: The packed token of each key, shape (K,).
        cu_seq_lens_q, cu_seq_lens_k: Start of each row's queries and keys, int32, shape (N + 1,).
        question_index, targets: The packed token whose hidden state answers each question, shape (S,), and the token
            that comes next, shape (1, S).
        label_index, answer_index: Place of each label in the flattened (rows, T - 1) of shifted labels, and its
            question, shape (L,).
        query_lengths, key_lengths: Added tokens and path length of each row, as Python numbers.
        shape: Shape (rows, T) of the padded batch.
        attention_calls, kernel, dtype, sliding_window: Set by the attention of the last forward.
    """

    input_ids: Tensor
    position_ids: Tensor
    gather_index: Tensor
    cu_seq_lens_q: Tensor
    cu_seq_lens_k: Tensor
    question_index: Tensor
    targets: Tensor
    label_index: Tensor
    answer_index: Tensor

    def __init__(self, numbers: Tensor, sizes: Sequence[int], query_lengths: Ints, key_lengths: Ints, shape: Any):
        self.query_lengths: list[int] = query_lengths.tolist()
        self.key_lengths: list[int] = key_lengths.tolist()
        self.max_length_q, self.max_length_k = max(self.query_lengths), max(self.key_lengths)
        self.shape = (int(shape[0]), int(shape[1]))
        self.padded_tokens = self.shape[0] * self.shape[1]
        self._sizes = list(sizes)
        self.attention_calls, self.kernel, self.dtype = 0, "", torch.float32
        self.sliding_window: int | None = None
        self.plans: dict[Any, Any] = {}  # of SDPA
        self._set(numbers)

    def _set(self, numbers: Tensor) -> None:
        self._numbers = numbers
        for name, value in zip(PackedBatch.__annotations__, torch.split(numbers, self._sizes), strict=True):
            setattr(self, name, value[None] if name in ("input_ids", "position_ids", "targets") else value)
        self.cu_seq_lens_q, self.cu_seq_lens_k = self.cu_seq_lens_q.int(), self.cu_seq_lens_k.int()

    @property
    def computed_tokens(self) -> int:
        """Tokens of the packed sequence."""
        return self.input_ids.numel()

    def pin_memory(self) -> "PackedBatch":
        """Move the indices to page-locked memory; called by PyTorch's data loader."""
        self._set(self._numbers.pin_memory())
        return self

    def to(self, device: Any, non_blocking: bool = False) -> "PackedBatch":
        """Move the indices to a device by one copy; called by accelerate's data loader.

        On CUDA the copy is made from page-locked memory and never blocks, whatever `non_blocking` is.
        """
        device = torch.device(device)
        if self._numbers.device != device and (device.index is not None or self._numbers.device.type != device.type):
            numbers = self._numbers
            if device.type == "cuda" and numbers.device.type == "cpu" and not numbers.is_pinned():
                numbers = numbers.pin_memory()
            self._set(numbers.to(device, non_blocking=device.type == "cuda"))
        return self


def pack(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor) -> PackedBatch | None:
    """Build the layout of a padded batch.

    Args:
        input_ids: Tokens, shape (rows, T), on any device.
        attention_mask: 1 for a token and 0 for padding on either side, shape (rows, T), or None without padding.
        labels: -100 for a token that is not scored, shape (rows, T).

    Returns:
        The layout, on the device of `input_ids`, or None if nothing is scored or a scored token is the first of a row.
    """
    device = input_ids.device
    if device.type != "cpu":  # one copy: each would wait for the device
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.dtype)
        input_ids, attention_mask, labels = torch.stack([input_ids, real, labels]).cpu()
    ids, scored = input_ids.numpy(), labels.numpy() != -100
    tokens = np.ones(ids.shape, dtype=bool) if attention_mask is None else attention_mask.numpy() != 0
    packed = _pack(ids, tokens, scored)
    return None if packed is None else packed.to(device)


def _pack(ids: NDArray[Any], real: NDArray[np.bool_], scored: NDArray[np.bool_]) -> PackedBatch | None:
    rows, width = ids.shape
    columns, lengths = np.arange(width, dtype=np.int32), real.sum(1, dtype=np.int64)
    row, column = scored.nonzero()
    row, column = row[column > 0], column[column > 0]
    position = column  # of each scored token in its row without padding
    within = columns < lengths[:, None]
    tokens = ids.astype(np.int32)
    if not np.array_equal(real, within):  # padding in front or between
        position = (real.cumsum(1) - 1)[row, column]
        tokens = np.zeros_like(tokens)
        tokens[within] = ids[real]
    if not len(position) or not (real[row, column] & (position > 0)).all():
        return None

    # Rows in the order of their tokens, each with the length of the prefix that it shares with the row before it.
    big_endian = tokens.astype(">u4")  # whose bytes sort as the numbers do
    keys = [line[:length].tobytes() for line, length in zip(big_endian, lengths, strict=True)]
    order = np.array(sorted(range(rows), key=keys.__getitem__))
    tokens, lengths = tokens[order], lengths[order]
    shared = np.zeros(rows, dtype=np.int64)
    for number in range(1, rows):
        both = slice(min(lengths[number], lengths[number - 1]))
        differ = tokens[number, both] != tokens[number - 1, both]
        shared[number] = differ.argmax() if differ.any() else both.stop

    # A row's path: the shared part of the path before it, then the places of its own tokens.
    query_lengths = lengths - shared
    starts = query_lengths.cumsum() - query_lengths
    places = np.empty((rows, width), dtype=np.int64)
    positions, paths = [], []
    for number, (start, first, length) in enumerate(zip(starts, shared, lengths, strict=True)):
        places[number, :first] = places[number - 1, :first]
        places[number, first:length] = np.arange(start, start + length - first)
        if first < length:
            positions.append(columns[first:length])
            paths.append(places[number, :length])
    packed = np.concatenate([line[first:length] for line, first, length in zip(tokens, shared, lengths, strict=True)])
    adds = query_lengths > 0
    query_lengths, key_lengths = query_lengths[adds], lengths[adds]

    # A scored token asks its predecessor; a packed token has one predecessor, so its place numbers the question.
    row_of = np.empty(rows, dtype=np.int64)
    row_of[order] = np.arange(rows)
    flat = row_of[row] * width + position
    asking, asked = places.ravel()[flat], places.ravel()[flat - 1]
    is_asking = np.zeros(len(packed), dtype=bool)
    is_asking[asking] = True
    predecessor = np.empty(len(packed), dtype=np.int64)
    predecessor[asking] = asked
    parts = (
        packed,
        np.concatenate(positions),
        np.concatenate(paths),
        np.append(0, query_lengths.cumsum()),
        np.append(0, key_lengths.cumsum()),
        predecessor[is_asking],
        packed[is_asking],
        row * (width - 1) + column - 1,
        (is_asking.cumsum() - 1)[asking],
    )  # in the order of the class's annotations
    numbers = torch.from_numpy(np.concatenate(parts).astype(np.int64, copy=False))
    return PackedBatch(numbers, [len(part) for part in parts], query_lengths, key_lengths, ids.shape)


@dataclass
class PackingCollator:
    """Add the packed layout to the batches of another collator, as `packed_batch`, on the CPU of the data loader."""

    collator: Callable[[list[dict[str, Any]]], Any]

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        """Collate, and add the layout unless the batch cannot be packed."""
        batch = self.collator(examples)
        if "input_ids" in batch and "completion_mask" in batch:
            labels = batch["input_ids"].masked_fill(~batch["completion_mask"].bool(), -100)
            packed = pack(batch["input_ids"], batch.get("attention_mask"), labels)
            if packed is not None:
                batch["packed_batch"] = packed
        return batch
