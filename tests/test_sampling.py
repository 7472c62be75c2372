"""`group_by_prompt`: who meets whom in a batch, in one process and in several, and what that saves."""

from collections import Counter

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from conftest import curve
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from apo_trl import APOConfig
from apo_trl.inputs import InputError
from apo_trl.sampling import PromptGroupedSampler


def batches(prompts, size, *, seed=0, epoch=0, processes=1):
    """The batches of an epoch, as the host's loader makes them of a sampler."""
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
    with pytest.raises(InputError, match="group_by_prompt=True cannot order a stream"):
        train(data=ranked().to_iterable_dataset(), group_by_prompt=True)


def test_two_orders_at_once_are_refused(tmp_path):
    with pytest.raises(InputError, match="group_by_prompt=True and train_sampling_strategy='group_by_length'"):
        APOConfig(str(tmp_path), group_by_prompt=True, train_sampling_strategy="group_by_length", use_cpu=True)
