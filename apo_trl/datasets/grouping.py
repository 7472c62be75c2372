"""`group_by_prompt`: the order in which pairs of one prompt meet in one batch, so that their prompt is computed once.

Left out on purpose: another batch. Every batch is as large as before and every row comes once an epoch; only who meets
whom changes.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler

__all__ = ["PromptGroupedSampler"]


class PromptGroupedSampler(Sampler[int]):
    """Shuffles the rows of a dataset so that those of one prompt are in one batch, as far as batches have room.

    Batches are the runs of `batch_size` rows from the start, which processes take in turn; only the last one of an
    epoch may be shorter. A prompt is split where it has more rows than a batch, and where nothing else would fill one.

    Args:
        prompts: What rows are grouped by, one for each row.
        batch_size: Rows of a batch in one process.
        seed: Of the shuffling, together with the epoch; the same in all processes.
    """

    def __init__(self, prompts: Iterable[Hashable], batch_size: int, seed: int) -> None:
        rows = defaultdict[Hashable, list[int]](list)
        for row, prompt in enumerate(prompts):
            rows[prompt].append(row)
        self._groups = list(rows.values())
        self._batch_size, self._seed, self._epoch = batch_size, seed, 0

    def __len__(self) -> int:
        return sum(map(len, self._groups))

    @property
    def group_of(self) -> NDArray[np.int64]:
        """The number of each row's prompt, shape (rows,)."""
        numbers = np.empty(len(self), dtype=np.int64)
        for number, rows in enumerate(self._groups):
            numbers[rows] = number
        return numbers

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which decides the order; called by accelerate."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)

        def shuffled(count: int) -> list[int]:
            order: list[int] = torch.randperm(count, generator=generator).tolist()
            return order

        size = self._batch_size
        blocks = defaultdict[int, list[list[int]]](list)  # by their number of rows
        for number in shuffled(len(self._groups)):
            group = [self._groups[number][at] for at in shuffled(len(self._groups[number]))]
            for at in range(0, len(group), size):
                blocks[len(group[at : at + size])].append(group[at : at + size])
        batches = []
        while any(blocks.values()):
            batches.append(_fill(blocks, size))
        short = [batches.pop()] if batches and len(batches[-1]) < size else []
        for number in shuffled(len(batches)):
            yield from batches[number]
        for batch in short:
            yield from batch


def _fill(blocks: dict[int, list[list[int]]], size: int) -> list[int]:
    """Take blocks for one batch: the largest that fit, and of what fits nowhere a part of the smallest."""
    batch: list[int] = []
    while (room := size - len(batch)) and any(blocks.values()):
        fitting = [length for length in range(room, 0, -1) if blocks[length]]
        length = fitting[0] if fitting else min(length for length, those in blocks.items() if those)
        block = blocks[length].pop()
        batch += block[:room]
        if block[room:]:
            blocks[length - room].append(block[room:])
    return batch
