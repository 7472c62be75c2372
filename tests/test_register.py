"""`register()`: explicit, idempotent, reversible, and the same as `APOTrainer`."""

import pickle
import subprocess
import sys

import pytest
from conftest import curve
from trl import DPOConfig, DPOTrainer

import apo_trl
from apo_trl import InputError


@pytest.fixture(autouse=True)
def _unregister():
    yield
    apo_trl.unregister()


def state():
    return dict(vars(DPOTrainer)), dict(vars(DPOConfig))


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_importing_changes_nothing_and_loads_nothing_heavy():
    code = "import sys, apo_trl; print([name for name in ('torch', 'trl', 'transformers') if name in sys.modules])"
    assert python(code) == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("first", ["from trl import DPOTrainer, DPOConfig", "import apo_trl"])
def test_importing_leaves_the_host_alone_in_either_order(first):
    code = f"""
{first}
import apo_trl, apo_trl.trainer
from trl import DPOTrainer, DPOConfig
before = dict(vars(DPOTrainer)), dict(vars(DPOConfig))
assert all(getattr(f, "__module__", "trl").startswith("trl") for f in before[0].values() if callable(f))
apo_trl.register()
assert dict(vars(DPOTrainer)) != before[0]
DPOConfig(loss_type="apo_zero_norm", bf16=False, use_cpu=True)
apo_trl.unregister()
assert (dict(vars(DPOTrainer)), dict(vars(DPOConfig))) == before
print("done")
"""
    assert python(code).endswith("done")


def test_twice_and_back():
    before = state()
    apo_trl.register()
    once = state()
    assert once != before
    apo_trl.register()
    assert state() == once
    apo_trl.unregister()
    assert state() == before
    apo_trl.unregister()
    assert state() == before


@pytest.mark.parametrize("loss_type", ["apo_zero_norm", "apo_blend", ["apo_zero", "sft"]], ids=str)
def test_the_plain_trainer_gives_the_curve_of_apo_trainer(train, loss_type):
    ours = train(loss_type=loss_type)
    apo_trl.register()
    theirs = train(DPOTrainer, DPOConfig, loss_type=loss_type)
    assert type(theirs).__name__ == "DPOTrainer"
    assert isinstance(theirs, DPOTrainer)
    for key in ("loss", "grad_norm", "apo/chosen_up", "rewards/margins"):
        assert curve(theirs, key) == curve(ours, key)


def test_what_the_class_of_a_trainer_becomes(train, tmp_path):
    """As the docstring of `register()` says: a subclass with TRL's name."""
    apo_trl.register()
    trainer = train(DPOTrainer, DPOConfig, run=False)
    assert isinstance(trainer, DPOTrainer)
    assert type(trainer) is not DPOTrainer
    assert (type(trainer).__name__, type(trainer).__module__) == (DPOTrainer.__name__, DPOTrainer.__module__)
    assert pickle.loads(pickle.dumps(trainer.args)).loss_type == trainer.args.loss_type
    with pytest.raises(pickle.PicklingError, match="DPOTrainer"):  # by its name, which is that of another class
        pickle.dumps(type(trainer))


def test_the_default_loss_stays_trls(train):
    apo_trl.register()
    trainer = train(DPOTrainer, DPOConfig, steps=1)
    assert trainer.args.loss_type == ["sigmoid"]
    assert curve(trainer)[0] == pytest.approx(0.693147, abs=1e-5)
    assert trainer._name == "DPO"


def test_a_wrong_loss_is_refused_when_the_plain_config_is_made():
    apo_trl.register()
    with pytest.raises(InputError, match=r"loss_type: 'apo_zer'.* Did you mean 'apo_zero'\?"):
        DPOConfig(loss_type="apo_zer", use_cpu=True, bf16=False)
    apo_trl.unregister()
    assert DPOConfig(loss_type="apo_zer", use_cpu=True, bf16=False).loss_type == ["apo_zer"]


def test_a_subclass_keeps_its_own_methods_in_front_of_ours(train):
    class Doubled(DPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.ready = True

        def _compute_loss(self, model, inputs, return_outputs):
            return 2 * super()._compute_loss(model, inputs, return_outputs)

    apo_trl.register()
    trainer = train(Doubled, DPOConfig, loss_type="apo_zero_norm", steps=1)
    assert trainer.ready
    assert isinstance(trainer, Doubled)
    assert curve(trainer)[0] == 2.0


def test_trainers_made_while_registered_keep_their_losses(train):
    apo_trl.register()
    trainer = train(DPOTrainer, DPOConfig, loss_type="apo_zero_norm", run=False)
    apo_trl.unregister()
    trainer.train()
    assert curve(trainer)[0] == 1.0


def test_apo_trainer_does_not_mind(train):
    expected = curve(train(loss_type="apo_zero_norm"))
    apo_trl.register()
    assert curve(train(loss_type="apo_zero_norm")) == expected
