"""`group_by_prompt`: an order of rows with the pairs of one prompt in one batch, so that it is computed once."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

from apo_trl.datasets.balancing import EpochSampler

__all__ = ["PromptGroupedSampler", "group_sampler"]


class PromptGroupedSampler(EpochSampler):
    """Shuffle the rows of a dataset with those of one prompt in one batch, as far as batches have room.

    Only the last batch of an epoch may be shorter. The rows of a prompt are split if they exceed a batch, or if nothing
    else fills one.

    Args:
        prompts: The key by which rows are grouped, one per row.
        batch_size: Rows of a batch in one process.
        seed: Seed of the shuffling, together with the epoch; the same in all processes.
    """

    def __init__(self, prompts: Iterable[Hashable], batch_size: int, seed: int) -> None:
        rows = defaultdict[Hashable, list[int]](list)
        for row, prompt in enumerate(prompts):
            rows[prompt].append(row)
        self._groups = list(rows.values())
        self._batch_size, self._seed = batch_size, seed
        self.group_of = np.empty(len(self), dtype=np.int64)
        for number, places in enumerate(self._groups):
            self.group_of[places] = number

    def __len__(self) -> int:
        return sum(map(len, self._groups))

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self.epoch)

        def shuffled(count: int) -> list[int]:
            order: list[int] = torch.randperm(count, generator=generator).tolist()
            return order

        size = self._batch_size
        blocks = defaultdict[int, list[list[int]]](list)  # by their number of rows
        for number in shuffled(len(self._groups)):
            group = [self._groups[number][index] for index in shuffled(len(self._groups[number]))]
            for start in range(0, len(group), size):
                block = group[start : start + size]
                blocks[len(block)].append(block)
        batches = []
        while any(blocks.values()):
            batches.append(_fill(blocks, size))
        short = [batches.pop()] if batches and len(batches[-1]) < size else []
        for number in shuffled(len(batches)):
            yield from batches[number]
        for batch in short:
            yield from batch


def group_sampler(dataset: Any, args: Any, batch_size: int) -> PromptGroupedSampler:
    """Build the sampler of a tokenized dataset, or of one with images, whose texts TRL tokenizes only in batches."""
    column = "prompt_ids" if "prompt_ids" in dataset.column_names else "prompt"
    seed = args.seed if args.data_seed is None else args.data_seed
    return PromptGroupedSampler(map(repr, dataset[column]), batch_size, seed)


def _fill(blocks: dict[int, list[list[int]]], size: int) -> list[int]:
    """Remove blocks for one batch: the largest that fit, and at last a part of the smallest that does not."""
    batch: list[int] = []
    while (room := size - len(batch)) and any(blocks.values()):
        fitting = [length for length in range(room, 0, -1) if blocks[length]]
        length = fitting[0] if fitting else min(length for length, those in blocks.items() if those)
        block = blocks[length].pop()
        batch += block[:room]
        if block[room:]:
            blocks[length - room].append(block[room:])
    return batch
