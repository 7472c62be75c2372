"""`balance_tokens`: an order of rows in which the batches of an optimizer step have nearly the same number of tokens.

A training step lasts as long as its fullest process. Pairs never move to another step, so gradients stay the same.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
from accelerate.data_loader import SeedableRandomSampler
from numpy.typing import NDArray
from torch.utils.data import RandomSampler, Sampler

from apo_trl.config import APOConfig, loss_names
from apo_trl.io.prompt import common_prefix_length

__all__ = ["BalancedSampler", "EpochSampler", "assign_cells", "balance_sampler", "count_tokens", "forward_epochs"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_BATCH_LOSSES = {"aot", "aot_unpaired", "sft"}  # they sort a micro-batch, or average over its tokens


class EpochSampler(Sampler[int]):
    """A sampler whose order depends on the epoch."""

    epoch = 0
    group_of: Ints | None = None
    """Index of each row's prompt, shape (rows,), if rows of one prompt are kept together."""

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; called by accelerate."""
        self.epoch = epoch


class BalancedSampler(EpochSampler):
    """Distribute the rows of each optimizer step over its batches by their number of tokens.

    Every step keeps the rows of `sampler`. An incomplete last step keeps its order. So does the first step if the rows
    do not fill the batches of all processes: accelerate repeats the rows of the first batches.

    Args:
        sampler: The order of an epoch.
        tokens: Distinct tokens of each row, shape (rows,).
        prompt_tokens: Prompt tokens among them, shape (rows,).
        batch_size: Rows of a batch in one process.
        processes: Number of processes, which take batches in turn.
        accumulation: Batches of each process in one optimizer step.
        groups: Index of each row's prompt, shape (rows,). Rows of one prompt in one batch stay together, and their
            prompt counts once. By default, each row moves alone.
    """

    def __init__(
        self,
        sampler: Sampler[int],
        tokens: Sequence[int] | Ints,
        prompt_tokens: Sequence[int] | Ints,
        *,
        batch_size: int,
        processes: int,
        accumulation: int,
        groups: Ints | None = None,
    ) -> None:
        self._sampler, self._processes = sampler, processes
        self._tokens, self._prompt_tokens = np.asarray(tokens), np.asarray(prompt_tokens)
        self._groups = np.arange(len(self._tokens)) if groups is None else groups
        self._cell_of_place = np.repeat(np.arange(processes * accumulation), batch_size)
        repeats = processes > 1 and len(self._tokens) % (batch_size * processes) > 0
        self._first = 1 if repeats else 0

    def __len__(self) -> int:
        return len(self._tokens)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the inner sampler."""
        if hasattr(self._sampler, "set_epoch"):
            self._sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        order, number = iter(self._sampler), 0
        while rows := list(islice(order, len(self._cell_of_place))):
            movable = number >= self._first and len(rows) == len(self._cell_of_place)
            yield from self._balance(np.array(rows)) if movable else rows
            number += 1

    def _balance(self, rows: Ints) -> list[int]:
        """Return the rows of one optimizer step in their new order."""
        keys = self._cell_of_place * (self._groups.max() + 1) + self._groups[rows]
        _, first, unit = np.unique(keys, return_index=True, return_inverse=True)  # a unit: one prompt in one cell
        prompts = np.zeros(len(first))
        np.maximum.at(prompts, unit, self._prompt_tokens[rows])
        costs = prompts + np.bincount(unit, self._tokens[rows] - self._prompt_tokens[rows])
        cells = assign_cells(costs, np.bincount(unit), self._cell_of_place[first])
        place = _arrange(np.bincount(cells, costs).astype(np.float64), self._processes)
        ordered: list[int] = rows[np.argsort(place[cells[unit]], kind="stable")].tolist()
        return ordered


def assign_cells(costs: Floats, sizes: Ints, cells: Ints) -> Ints:
    """Compute the cell of each unit, with nearly the smallest possible cost of the fullest cell.

    Longest units first, each goes to the emptiest cell that had a unit of its size. Then the fullest cell swaps units
    of one size with other cells while that helps. Each cell keeps its number of units of each size. Costs, sizes (in
    rows) and cells before and after have shape (units,).
    """
    room = np.zeros((sizes.max() + 1, cells.max() + 1))
    np.add.at(room, (sizes, cells), 1)
    loads, new = np.zeros(room.shape[1]), np.empty_like(cells)
    for unit in np.argsort(-costs, kind="stable"):
        cell = np.where(room[sizes[unit]] > 0, loads, np.inf).argmin()
        room[sizes[unit], cell] -= 1
        loads[cell] += costs[unit]
        new[unit] = cell
    while True:
        fullest = loads.argmax()
        inside = (new == fullest).nonzero()[0]
        moved = costs[inside, None] - costs  # from the fullest cell to that of each other unit
        after = np.maximum(loads[fullest] - moved, loads[new] + moved)
        after[(sizes[inside, None] != sizes) | (new == fullest)] = np.inf
        one, other = np.unravel_index(after.argmin(), after.shape)
        if after[one, other] >= loads[fullest]:
            break
        loads[fullest] -= moved[one, other]
        loads[new[other]] += moved[one, other]
        new[inside[one]], new[other] = new[other], fullest
    # With units of many sizes, the order before may be the better one.
    return new if loads.max() < np.bincount(cells, costs).max() else cells


def _arrange(loads: Floats, processes: int) -> Ints:
    """Compute the place of each cell, with similar cells in one micro-step and similar sums in all processes."""
    place, sums = np.empty(len(loads), dtype=np.int64), np.zeros(processes)
    for start, cells in enumerate(np.argsort(-loads, kind="stable").reshape(-1, processes)):
        ranks = np.argsort(sums, kind="stable")  # the emptiest so far takes the fullest cell
        place[cells] = start * processes + ranks
        sums[ranks] += loads[cells]
    return place


def count_tokens(row: Mapping[str, Any], *, max_length: int | None, keep_end: bool) -> dict[str, int]:
    """Count the distinct tokens of a pair after the truncation of TRL's collator, and those of its prompt."""
    prompt, cut = row["prompt_ids"], slice(None, max_length)
    if keep_end and max_length is not None:
        cut = slice(-max_length, None)
    chosen, rejected = (prompt + row["chosen_ids"])[cut], (prompt + row["rejected_ids"])[cut]
    shared = common_prefix_length(chosen, rejected)
    return {"tokens": len(chosen) + len(rejected) - shared, "prompt_tokens": min(shared, len(prompt))}


def balance_sampler(sampler: Any, dataset: Any, args: Any, batch_size: int) -> Any:
    """Return `sampler` with each optimizer step balanced, or `sampler` itself if the settings rule that out.

    `batch_size` is that of one process.
    """
    loader = args.accelerator_config
    groups = sampler.group_of if isinstance(sampler, EpochSampler) else None
    if not isinstance(args, APOConfig) or not args.balance_tokens or _BATCH_LOSSES.intersection(loss_names(args)):
        return sampler
    if loader.split_batches or "prompt_ids" not in dataset.column_names:  # images: tokenized only in the collator
        return sampler
    if groups is None:
        if not isinstance(sampler, RandomSampler) or not loader.use_seedable_sampler:
            return sampler
        # accelerate replaces a RandomSampler with this one, but not a RandomSampler inside of another sampler.
        sampler = SeedableRandomSampler(sampler.data_source, data_seed=args.data_seed)
    with args.main_process_first(desc="counting tokens"):
        counts = dataset.map(
            count_tokens,
            fn_kwargs={"max_length": args.max_length, "keep_end": args.truncation_mode == "keep_end"},
            remove_columns=dataset.column_names,
            num_proc=args.dataset_num_proc,
            desc="Counting tokens of train dataset",
        ).with_format("numpy")
    return BalancedSampler(
        sampler,
        counts["tokens"][:],
        counts["prompt_tokens"][:],
        batch_size=batch_size,
        processes=args.world_size,
        accumulation=args.gradient_accumulation_steps,
        groups=groups,
    )


def forward_epochs(loader: Any) -> Any:
    """Return the loader, with its epoch forwarded to our sampler if several processes resume in the middle of one.

    `skip_first_batches` hides a sampler from `set_epoch` unless it is an attribute of the shard, as accelerate's is.
    """
    shard = loader.batch_sampler
    sampler = getattr(getattr(shard, "batch_sampler", None), "sampler", None)
    if isinstance(sampler, EpochSampler):
        shard.sampler = sampler
    return loader
