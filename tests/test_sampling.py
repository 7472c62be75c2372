"""`group_by_prompt` and `balance_tokens`: which pairs share a batch, in one process and in several, and the gain."""

import importlib.util
import time
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler, prepare_data_loader, skip_first_batches
from conftest import curve
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from apo_trl import APOConfig
from apo_trl.datasets.balancing import BalancedSampler, assign_cells, balance_sampler, count_tokens, forward_epochs
from apo_trl.datasets.grouping import PromptGroupedSampler
from apo_trl.errors import InputError
from apo_trl.prefix_sharing import pack


def batches(prompts, size, *, seed=0, epoch=0, processes=1):
    """The batches of an epoch, as TRL's loader makes them of a sampler."""
    sampler = PromptGroupedSampler(prompts, size, seed)
    sampler.set_epoch(epoch)
    whole = BatchSampler(sampler, size, drop_last=False)
    if processes == 1:
        return list(whole)
    shards = [list(BatchSamplerShard(whole, processes, at, even_batches=False)) for at in range(processes)]
    return [batch for turn in zip(*shards, strict=False) for batch in turn]


@given(st.lists(st.integers(0, 6), max_size=60), st.integers(1, 9), st.integers(0, 3))
def test_every_row_comes_once_and_every_batch_but_the_last_is_full(prompts, size, epoch):
    found = batches(prompts, size, epoch=epoch)
    assert sorted(row for batch in found for row in batch) == list(range(len(prompts)))
    assert all(len(batch) == size for batch in found[:-1])


@pytest.mark.parametrize("processes", [1, 2])
def test_pairs_of_one_prompt_meet(processes):
    """Threes and ones in batches of four: every three stays together."""
    prompts = [f"three-{i % 20}" for i in range(60)] + [f"one-{i}" for i in range(20)]
    found = batches(prompts, 4, processes=processes)
    assert len(found) == 20
    for batch in found:
        counts = Counter(prompts[row] for row in batch)
        assert sorted(counts.values()) == [1, 3]


def test_what_fills_no_batch_is_split_as_little_as_can_be():
    """Threes alone in batches of four: one of four is split to fill the other three."""
    prompts = [i // 3 for i in range(48)]
    whole = sum(max(Counter(prompts[row] for row in batch).values()) == 3 for batch in batches(prompts, 4))
    assert whole == 12


def test_a_prompt_of_more_rows_than_a_batch_fills_several():
    found = batches(["a"] * 10 + ["b"] * 2, 4)
    assert sorted(sum(row < 10 for row in batch) for batch in found) == [2, 4, 4]


def test_the_order_is_that_of_seed_and_epoch():
    prompts = [i // 2 for i in range(40)]
    assert batches(prompts, 4) == batches(prompts, 4)
    assert batches(prompts, 4) != batches(prompts, 4, epoch=1)
    assert batches(prompts, 4) != batches(prompts, 4, seed=1)


def ranked(prompts: int = 8) -> Dataset:
    """Three pairs of three ranked answers to each prompt, prompts in turn, so that an order by rows parts them."""
    rows = []
    for best, worst in (("good", "fair"), ("fair", "bad"), ("good", "bad")):
        rows += [
            {
                "prompt": [{"role": "user", "content": f"A question of some length, the number {i} of all of them?"}],
                "chosen": [{"role": "assistant", "content": f"This is a {best} answer"}],
                "rejected": [{"role": "assistant", "content": f"This is a {worst} answer"}],
            }
            for i in range(prompts)
        ]
    return Dataset.from_list(rows)


def test_training_computes_fewer_tokens_and_sees_every_row_in_every_epoch(train):
    seen = []

    def collated(trainer):
        collate = trainer.data_collator

        def keep(rows):
            seen.extend(tuple(row["prompt_ids"] + row["chosen_ids"] + row["rejected_ids"]) for row in rows)
            return collate(rows)

        trainer.data_collator = keep
        trainer.train()
        return curve(trainer, "apo/tokens_saved")

    options = dict(data=ranked(), padding_free=True, per_device_train_batch_size=3, steps=16, run=False)
    grouped = collated(train(group_by_prompt=True, **options))
    epochs = [seen[:24], seen[24:48]]
    assert [len(set(epoch)) for epoch in epochs] == [24, 24]
    assert epochs[0] != epochs[1]
    apart = collated(train(**options))
    assert len(grouped) == len(apart) == 16
    # Three pairs of one prompt are six rows of one text but for the answers' ends.
    assert min(grouped) > 3
    assert sum(grouped) > 1.3 * sum(apart)


def test_it_goes_on_after_an_interruption_with_the_rows_that_are_left(train, tmp_path):
    options = dict(data=ranked(), group_by_prompt=True, per_device_train_batch_size=3, save_strategy="steps")
    whole = train(**options, save_steps=3, steps=10)
    again = train(**options, save_steps=3, steps=10, run=False)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert curve(again) == curve(whole)
    weights = [trainer.model.state_dict() for trainer in (whole, again)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_stream_cannot_be_ordered(train):
    with pytest.raises(InputError, match=r"group_by_prompt: .*stream"):
        train(data=ranked().to_iterable_dataset(), group_by_prompt=True)


def test_two_orders_at_once_are_refused(tmp_path):
    with pytest.raises(InputError, match="group_by_prompt: conflicts with train_sampling_strategy='group_by_length'"):
        APOConfig(str(tmp_path), group_by_prompt=True, train_sampling_strategy="group_by_length", use_cpu=True)


# `balance_tokens`


@st.composite
def settings(draw):
    """Rows, seed of their lengths, and rows, processes and micro-steps of a step."""
    return dict(
        rows=draw(st.integers(1, 90)),
        seed=draw(st.integers(0, 5)),
        batch_size=draw(st.integers(1, 4)),
        processes=draw(st.integers(1, 4)),
        accumulation=draw(st.integers(1, 4)),
    )


def lengths(rows, seed):
    return np.random.default_rng(seed).lognormal(5, 1, rows).astype(int)


def steps(sampler, batch_size, processes, accumulation, epochs=(0,), rows=None, data_seed=None, **options):
    """The steps of some epochs, each a list of the batches of all processes by micro-step, as accelerate deals them."""
    found = []
    for epoch in epochs:
        dealt = []
        for rank in range(processes):
            loader = DataLoader(range(len(sampler)), batch_size=batch_size, sampler=sampler)
            loader = prepare_data_loader(
                loader, num_processes=processes, process_index=rank, use_seedable_sampler=True, data_seed=data_seed,
                put_on_device=False, **options,
            )  # fmt: skip
            loader.set_epoch(epoch)
            dealt.append(list(loader.batch_sampler))
        for start in range(0, max(map(len, dealt)), accumulation):
            found.append([batches[start : start + accumulation] for batches in dealt])
    return found


def members(step):
    return Counter(row for batches in step for batch in batches for row in batch)


def sizes(step):
    return [[len(batch) for batch in batches] for batches in step]


@given(settings(), st.booleans(), st.sampled_from([None, 0, 7]))
def test_every_step_keeps_its_pairs_and_every_batch_its_size(given, even_batches, data_seed):
    rows, seed = given.pop("rows"), given.pop("seed")
    options = given | dict(epochs=(0, 1, 3), even_batches=even_batches, data_seed=data_seed)
    sampler = SeedableRandomSampler(range(rows), data_seed=data_seed)
    sampler = BalancedSampler(sampler, lengths(rows, seed), np.zeros(rows, dtype=int), **given)
    before, after = steps(RandomSampler(range(rows)), **options), steps(sampler, **options)
    assert len(before) == len(after) > 0
    assert [members(step) for step in after] == [members(step) for step in before]
    assert [sizes(step) for step in after] == [sizes(step) for step in before]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_resumed_epoch_has_the_batches_that_are_left(processes, grouped):
    """Two micro-steps of the second epoch are skipped, as the trainer does it."""

    def loader():
        if grouped:
            sampler = PromptGroupedSampler([row // 3 for row in range(48)], 2, 0)
        else:
            base, zeros = SeedableRandomSampler(range(48), data_seed=0), np.zeros(48, dtype=int)
            options = dict(batch_size=2, processes=processes, accumulation=2)
            sampler = BalancedSampler(base, lengths(48, 0), zeros, **options)
        loader = DataLoader(range(48), batch_size=2, sampler=sampler)
        options = dict(num_processes=processes, process_index=0, put_on_device=False)
        return forward_epochs(prepare_data_loader(loader, **options))

    whole, resumed = loader(), skip_first_batches(loader(), 2)
    for each in (whole, resumed):
        each.set_epoch(1)
    assert list(resumed.batch_sampler) == list(whole.batch_sampler)[2:]


@given(settings(), st.integers(1, 30))
def test_pairs_of_one_prompt_move_together(given, prompts):
    rows, seed = given.pop("rows"), given.pop("seed")
    tokens = lengths(rows, seed)
    sampler = PromptGroupedSampler([row % prompts for row in range(rows)], given["batch_size"], seed)
    assert list(sampler.group_of) == [row % prompts for row in range(rows)]
    balance_sampler = BalancedSampler(sampler, tokens, tokens // 3, groups=sampler.group_of, **given)
    before, after = steps(sampler, **given), steps(balance_sampler, **given)
    assert [members(step) for step in after] == [members(step) for step in before]
    assert [sizes(step) for step in after] == [sizes(step) for step in before]

    def blocks(step):
        batches = [batch for batches in step for batch in batches]
        return sorted(
            sorted(row for row in batch if row % prompts == prompt) for batch in batches for prompt in range(prompts)
        )

    # An incomplete round of processes is filled with rows from the start, which tell nothing of blocks.
    if rows % (given["batch_size"] * given["processes"]) == 0:
        assert [blocks(step) for step in after] == [blocks(step) for step in before]


def test_the_prompt_of_a_block_counts_once():
    """Blocks of 120 (100 of them prompt), 110, 100, 90, 80 and 80; 220 for the first would pair it with 80 and 80."""
    sampler = BalancedSampler(
        range(12), [110, 110, 55, 55, 50, 50, 45, 45, 40, 40, 40, 40], [100, 100] + [0] * 10,
        batch_size=6, processes=2, accumulation=1, groups=np.arange(12) // 2,
    )  # fmt: skip
    cells = np.array(list(sampler)).reshape(2, 6).tolist()
    assert sorted(map(sorted, cells)) == [[0, 1, 6, 7, 8, 9], [2, 3, 4, 5, 10, 11]]


@pytest.mark.parametrize(
    ("costs", "cells", "fullest"),
    [
        ([4, 3, 2, 1], [0, 0, 1, 1], 5),
        ([9, 1, 1, 1], [0, 0, 1, 1], 10),
        ([9, 9, 7, 7, 6, 2], [0, 0, 0, 1, 1, 1], 20),  # longest first: 9 7 6 and 9 7 2, then 9 9 2 and 7 7 6
    ],
)
def test_spread_by_hand(costs, cells, fullest):
    costs = np.array(costs, dtype=float)
    found = assign_cells(costs, np.ones(len(costs), dtype=int), np.array(cells))
    assert np.bincount(found).tolist() == np.bincount(cells).tolist()
    assert np.bincount(found, costs).max() == fullest


def test_alike_batches_share_a_micro_step_and_processes_have_alike_sums():
    """Single rows of 8, 6, 4 and 2 tokens in two processes: 8 and 6 first, then 2 for the process that had 8."""
    sampler = BalancedSampler(range(4), [2, 8, 4, 6], [0] * 4, batch_size=1, processes=2, accumulation=2)
    assert list(sampler) == [1, 3, 0, 2]


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 1000))
def test_the_fullest_cell_is_near_the_mean(count, units, seed):
    """Cells with the same sizes of units: none gets more than the mean and the longest unit together."""
    costs = np.random.default_rng(seed).lognormal(5, 1, count * units).round()
    cells, sizes = np.arange(count * units) % count, 1 + np.arange(count * units) // count % 3
    found = assign_cells(costs, sizes, cells)
    for size in (1, 2, 3):
        assert (np.bincount(found[sizes == size]) == np.bincount(cells[sizes == size])).all()
    assert np.bincount(found, costs).max() <= costs.sum() / count + costs.max()


@given(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=6), st.integers(0, 1000))
def test_spread_keeps_what_a_cell_holds_and_never_makes_the_fullest_fuller(pattern, seed):
    """Any sizes of units in any cell."""
    cells = np.repeat(np.arange(len(pattern)), [len(cell) for cell in pattern])
    sizes = np.array([size for cell in pattern for size in cell])
    costs = (np.random.default_rng(seed).lognormal(5, 1, len(sizes)) * sizes).round()
    found = assign_cells(costs, sizes, cells)
    assert sorted(zip(found, sizes, strict=True)) == sorted(zip(cells, sizes, strict=True))
    assert np.bincount(found, costs).max() <= np.bincount(cells, costs).max()


token_ids = st.lists(st.integers(1, 3), min_size=1, max_size=12)


@given(token_ids, token_ids, token_ids, st.sampled_from([None, 5, 9]), st.booleans())
def test_the_tokens_of_a_pair_are_those_that_are_packed(prompt, chosen, rejected, max_length, keep_end):
    row = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
    mode = "keep_end" if keep_end else "keep_start"
    batch = DataCollatorForPreference(pad_token_id=0, max_length=max_length, truncation_mode=mode)([row])
    packed = pack(batch["input_ids"], batch["attention_mask"], batch["completion_mask"] * 101 - 100)
    found = count_tokens(row, max_length=max_length, keep_end=keep_end)
    if packed is not None:
        assert found["tokens"] == packed.computed_tokens
    assert 0 <= found["prompt_tokens"] <= min(len(prompt), found["tokens"])


@pytest.mark.parametrize(
    ("max_length", "keep_end", "tokens", "prompt_tokens"),
    [(None, False, 7, 3), (5, False, 6, 3), (4, False, 4, 3), (6, True, 7, 3), (5, True, 10, 0)],
)
def test_tokens_by_hand(max_length, keep_end, tokens, prompt_tokens):
    """Prompt 1 2 3, completions 4 5 and 4 6 7."""
    row = {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [4, 6, 7]}
    found = count_tokens(row, max_length=max_length, keep_end=keep_end)
    assert found == {"tokens": tokens, "prompt_tokens": prompt_tokens}


def uneven(rows: int = 52) -> Dataset:
    """Pairs whose completions have from 4 to 180 tokens, in random order, two to a prompt."""
    words = np.random.default_rng(0).lognormal(1.5, 1, (rows, 2)).astype(int).clip(1, 30).tolist()
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"Question {number // 2}?"}],
                "chosen": [{"role": "assistant", "content": "right " * long}],
                "rejected": [{"role": "assistant", "content": "wrong " * short}],
            }
            for number, (long, short) in enumerate(words)
        ]
    )


ACCUMULATED = dict(padding_free=True, per_device_train_batch_size=4, gradient_accumulation_steps=4, max_length=256)


def weights(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


@pytest.mark.parametrize("group_by_prompt", [False, True])
def test_training_is_the_same_and_its_batches_are_even(train, group_by_prompt):
    """52 rows: every epoch has three full steps and one of a single batch."""
    seen = {}

    def collated(balance_tokens):
        trainer = train(
            data=uneven(), balance_tokens=balance_tokens, group_by_prompt=group_by_prompt, steps=9, run=False,
            **ACCUMULATED,
        )  # fmt: skip
        collate, tokens = trainer.data_collator, seen.setdefault(balance_tokens, [])

        def keep(rows):
            batch = collate(rows)
            tokens.append(batch["packed_batch"].computed_tokens)
            return batch

        trainer.data_collator = keep
        trainer.train()
        return trainer

    off, on = collated(False), collated(True)
    assert len(curve(on)) == len(curve(off)) == 9
    assert curve(on) == pytest.approx(curve(off), abs=1e-5)
    assert curve(on, "grad_norm") == pytest.approx(curve(off, "grad_norm"), rel=1e-4)
    assert (weights(on) - weights(off)).abs().max() < 1e-5
    # Full steps of the first two epochs, which have 13 batches each.
    full = [start + step for start in (0, 13) for step in (0, 4, 8)]
    fullest = {key: sum(max(tokens[at : at + 4]) for at in full) for key, tokens in seen.items()}
    assert fullest[True] < 0.95 * fullest[False]


@pytest.mark.parametrize("group_by_prompt", [False, True])
def test_a_balanced_run_resumes_in_the_middle_of_an_epoch(train, tmp_path, group_by_prompt):
    """Step 6 of 9 is the second of the second epoch, which has four steps."""
    options = dict(data=uneven(), group_by_prompt=group_by_prompt, save_strategy="steps", save_steps=6, steps=9)
    whole = train(**options, **ACCUMULATED)
    again = train(**options, **ACCUMULATED, run=False)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-6"))
    assert curve(again) == curve(whole)
    assert torch.equal(weights(again), weights(whole))


@pytest.mark.parametrize("data_seed", [None, 7])
def test_the_trainer_keeps_the_steps_of_every_epoch(train, data_seed):
    found = {}
    for balance_tokens in (False, True):
        trainer = train(data=uneven(), balance_tokens=balance_tokens, data_seed=data_seed, run=False, **ACCUMULATED)
        loader = trainer.get_train_dataloader()
        found[balance_tokens] = []
        for epoch in range(3):
            loader.set_epoch(epoch)
            found[balance_tokens].append([sorted(batch) for batch in loader.batch_sampler])
    for before, after in zip(found[False], found[True], strict=True):
        assert before != after
        assert before[12:] == after[12:]
        for start in (0, 4, 8):
            assert sorted(chain(*before[start : start + 4])) == sorted(chain(*after[start : start + 4]))
    assert found[True][0] != found[True][1]


def sampling_strategy():
    if Version(transformers.__version__) < Version("5"):  # goes when that is the floor
        return {"group_by_length": True}
    return {"train_sampling_strategy": "sequential"}


@pytest.mark.parametrize(
    "settings",
    [
        {"balance_tokens": False},
        {"padding_free": False},
        {"gradient_accumulation_steps": 1},
        {"loss_type": ["aot"]},
        {"loss_type": ["aot_unpaired"]},
        {"loss_type": ["apo_zero", "sft"], "loss_weights": [1.0, 0.1]},
        {"neftune_noise_alpha": 5.0},  # needs padded batches
        {"accelerator_config": {"split_batches": True}},
        {"accelerator_config": {"use_seedable_sampler": False}},
        {"config_class": DPOConfig},
        sampling_strategy(),
    ],
    ids=str,
)
def test_the_order_stays_trl_s(train, settings):
    trainer = train(data=uneven(), run=False, **(ACCUMULATED | settings))
    assert type(trainer._get_train_sampler()) is type(DPOTrainer._get_train_sampler(trainer))


def test_a_stream_keeps_its_order(train):
    trainer = train(data=uneven().to_iterable_dataset(), **ACCUMULATED, steps=2)
    assert len(curve(trainer)) == 2


def test_images_are_not_balanced(train):
    trainer = train(data=uneven(), run=False, **ACCUMULATED)
    assert isinstance(trainer._get_train_sampler(), BalancedSampler)
    images, sampler = Dataset.from_dict({"prompt": ["a"] * 16}), RandomSampler(range(16))
    assert balance_sampler(sampler, images, trainer.args, 2) is sampler


def test_lengths_as_ultrafeedback_s_reach_the_goal_fast():
    """docs/measure_balance.py: 8 ranks with 2 pairs and 4 micro-steps."""
    path = Path(__file__).parents[1] / "docs" / "measure_balance.py"
    spec = importlib.util.spec_from_file_location("measure_balance", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    lengths = module.draw_lengths(60_000, 1024, 0)
    began = time.perf_counter()
    drawn, drawn_sum, even, even_sum = module.measure(*lengths, pairs=2, ranks=8, steps=4)
    assert time.perf_counter() - began < 5
    assert drawn > 1.5
    assert drawn_sum > 1.2
    assert 1 <= even_sum <= even <= 1.12
