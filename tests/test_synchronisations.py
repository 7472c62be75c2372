"""What a training step reads from the device: at most once more than TRL's own step does."""

import pytest
import torch
from conftest import curve
from trl import DPOConfig, DPOTrainer

READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__")


@pytest.fixture
def count(monkeypatch):
    """Train, and count the reads of tensors in each `compute_loss`, where a device would be waited for."""

    def run(trainer):
        compute, counts = trainer.compute_loss, []

        def spy(name):
            read = getattr(torch.Tensor, name)

            def call(tensor, *args, **kwargs):
                counts[-1] += 1
                return read(tensor, *args, **kwargs)

            return call

        def counted(*args, **kwargs):
            counts.append(0)
            with monkeypatch.context() as patch:
                for name in READS:
                    patch.setattr(torch.Tensor, name, spy(name))
                return compute(*args, **kwargs)

        trainer.compute_loss = counted
        trainer.train()
        return counts

    return run


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "losses",
    [["apo_zero"], ["apo_zero_norm"], ["sigmoid", "apo_zero"], ["apo_zero", "apo_down_norm", "sft"], ["aot"]],
    ids=str,
)
def test_a_step_reads_once_more_than_trls(train, count, losses, workers):
    theirs = count(train(DPOTrainer, DPOConfig, loss_type=["sigmoid"], steps=3, run=False))
    trainer = train(loss_type=losses, padding_free=True, steps=3, run=False, dataloader_num_workers=workers)
    ours = count(trainer)
    assert len(theirs) == len(ours) == 3
    assert max(theirs) > 5  # the spy sees them
    # TRL's `sft` reads a mask of its own when it is one of the losses; what we add is one read.
    assert max(ours) <= max(theirs) + 1
    assert min(curve(trainer, "apo/tokens_saved")) > 1.2
