"""What the metrics say about pairs whose regime is plain to see."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from test_cli import BIN, command
from transformers import EarlyStoppingCallback
from trl import DPOConfig, DPOTrainer

from apo_trl.config import TRL_LOSSES
from apo_trl.evaluation.regimes import REGIMES, regime
from apo_trl.io.resources import recipe_folder
from apo_trl.losses import LOSSES
from apo_trl.metrics import pair_metrics
from apo_trl.registration import register, unregister
from apo_trl.saturation import PAIR_LOSSES, Saturation, largest_slope, slope


def test_regimes_by_hand():
    #            separated displaced both_up reversed anchor  chosen fell most
    chosen = torch.tensor([2.0, -1.0, 1.0, -1.0, 0.0, -5.0])
    rejected = torch.tensor([-2.0, -3.0, 0.5, 1.0, 0.0, -1.0])
    lengths = torch.tensor([4, 2, 1, 1, 1, 10])
    got = pair_metrics(chosen, rejected, chosen_lengths=lengths, rejected_lengths=2 * lengths)
    expected = {
        "chosen_up": [1, 0, 1, 0, 0, 0],
        "rejected_down": [1, 1, 0, 0, 0, 1],
        "separated": [1, 0, 0, 0, 0, 0],
        "displaced": [0, 1, 0, 0, 0, 0],
        "both_up": [0, 0, 1, 0, 0, 0],
        "chosen_logratio_per_token": [0.5, -0.5, 1, -1, 0, -0.5],
        "rejected_logratio_per_token": [-0.25, -0.75, 0.25, 0.5, 0, -0.05],
    }
    assert {name: value.tolist() for name, value in got.items()} == {
        name: pytest.approx(values) for name, values in expected.items()
    }


@pytest.mark.parametrize(
    ("pair", "expected"),
    [((2, -2), "separated"), ((-1, -3), "displaced"), ((1, 0.5), "both_up"), ((0.5, 1), "both_up"),
     ((-1, 1), "other"), ((-5, -1), "other"), ((0, 0), "other"), ((1, 0), "other"), ((0, -1), "other")],
)  # fmt: skip
def test_the_regime_of_a_pair_is_the_metric_that_is_1(pair, expected):
    assert regime(*pair) == expected
    ones = torch.ones(1)
    metrics = pair_metrics(*torch.tensor(pair)[:, None], chosen_lengths=ones, rejected_lengths=ones)
    assert [name for name in REGIMES if metrics[name]] == ([] if expected == "other" else [expected])


def test_an_empty_completion_does_not_divide_by_zero():
    zero = torch.tensor([0])
    got = pair_metrics(torch.zeros(1), torch.zeros(1), chosen_lengths=zero, rejected_lengths=zero)
    assert got["chosen_logratio_per_token"].item() == 0


SETTINGS = SimpleNamespace(beta=0.1, label_smoothing=0.1, discopop_tau=0.05)
# At rewards without bound: of sigmoid(-m) the largest slope is 1, of a sigmoid 1/4; both sides count.
LARGEST = {
    "sigmoid": math.sqrt(2),
    "sigmoid_norm": math.sqrt(2),
    "hinge": math.sqrt(2),
    "robust": math.sqrt(2) * 0.9 / 0.8,
    "bco_pair": math.sqrt(2),
    "nca_pair": math.sqrt(1 + 1 / 4),  # a chosen reward far below, a rejected one far above the reference
    "apo_zero": math.sqrt(2) / 4,
    "apo_zero_norm": math.sqrt(2) / 4,
    "ipo": math.nan,
    "sppo_hard": math.nan,
}


@pytest.mark.parametrize("name", LARGEST)
def test_largest_slope_by_hand(name):
    assert largest_slope(name, SETTINGS) == pytest.approx(LARGEST[name], rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("name", sorted(PAIR_LOSSES - LARGEST.keys()))
def test_largest_slope_is_not_missed_between_the_steps(name):
    """Of the others, against a search a hundred times as fine about where they turn."""
    line = torch.linspace(-4, 4, 1601, dtype=torch.float64)
    chosen, rejected = torch.cartesian_prod(line, line).unbind(1)
    fine = max(slope(name, chosen, rejected, SETTINGS, torch.full_like(chosen, wins)).max().item() for wins in (0, 1))
    assert largest_slope(name, SETTINGS) == pytest.approx(fine, rel=0.05)


def config(**settings):
    return DPOConfig("unused", use_cpu=True, bf16=False, report_to="none", **settings)


def pairs(margins, length=1):
    margins = torch.as_tensor(margins)
    lengths = torch.full((len(margins),), length)
    return {
        "chosen_logratios": margins / 2,
        "rejected_logratios": -margins / 2,
        "chosen_lengths": lengths,
        "rejected_lengths": lengths,
    }


def test_saturation_of_a_mixture_is_that_of_all_its_losses():
    """`sigmoid` keeps 1 % of its slope up to a margin of ln 99 = 4.6, `hinge` all of it up to 1, then nothing."""
    margins = torch.tensor([0.9, 1.1, 4.5, 4.7]) / 0.1
    for losses, expected in (
        (["hinge"], [0, 1, 1, 1]),
        (["sigmoid"], [0, 0, 0, 1]),
        (["sigmoid", "hinge"], [0, 0, 0, 1]),
        (["hinge", "sft"], [0, 1, 1, 1]),
        (["hinge", "sppo_hard"], [0, 0, 0, 0]),
    ):
        saturation = Saturation(losses, config(beta=0.1, loss_type=losses))
        assert saturation(pairs(margins)).tolist() == expected, losses


def test_saturation_per_token():
    for name, expected in (("sigmoid_norm", [1, 0]), ("sigmoid", [1, 1])):
        saturation = Saturation([name], config(beta=0.1, loss_type=[name]))
        assert [saturation(pairs([60.0], length)).item() for length in (1, 2)] == expected, name


@pytest.mark.parametrize(
    ("losses", "settings"),
    [
        (["aot"], {}),
        (["aot_unpaired"], {}),
        (["sigmoid", "aot"], {}),
        (["sft"], {}),
        (["sigmoid"], {"f_divergence_type": "js_divergence"}),
        (["sigmoid"], {"f_divergence_type": "forward_kl"}),
        (["apo_zero"], {"f_divergence_type": "alpha_divergence"}),
        (["a_loss_of_next_year"], {}),
        (["sigmoid", "a_loss_of_next_year"], {}),
    ],
    ids=str,
)
def test_without_slopes_of_single_pairs_there_is_no_saturation(losses, settings):
    assert not Saturation(losses, config(**settings)).losses


def test_losses_without_a_slope_are_those_that_look_at_the_whole_batch():
    """A loss that a new TRL brings fails here, until its equation is written down."""
    assert {*TRL_LOSSES, *LOSSES} - PAIR_LOSSES == {"aot", "aot_unpaired", "sft"}
    assert {*TRL_LOSSES, *LOSSES} >= PAIR_LOSSES


# In evaluation and in training: which means are logged, and under which names.

SETS = {"a": range(5), "b_c": range(5, 8)}
SPEED = {"runtime", "samples_per_second", "steps_per_second"}


@pytest.fixture
def evaluating(train, dataset):
    """Build a trainer whose policy is not its reference, without training it."""

    def build(batch_size=4, *, sets=None, **settings):
        sets = sets or {name: dataset.select(part) for name, part in SETS.items()}
        settings = {"ref_model": make_model(seed=1), "eval_dataset": sets, "prediction_loss_only": True} | settings
        return train(run=False, per_device_eval_batch_size=batch_size, **settings)

    return build


def test_every_metric_is_logged_under_its_set(evaluating):
    trainer = evaluating(loss_type=["apo_zero", "sft"], loss_weights=[1.0, 0.1])
    returned = trainer.evaluate()
    logged = {name: next(entry for entry in trainer.state.log_history if f"eval_{name}_loss" in entry) for name in SETS}
    names = {
        name: {key.removeprefix(f"eval_{name}_") for key in entry if key.startswith("eval_")}
        for name, entry in logged.items()
    }
    assert names["a"] == names["b_c"]
    assert names["a"] >= {"loss", "loss/sft", "rewards/accuracies", "apo/displaced", "logps/chosen", "entropy"}
    for name, entry in logged.items():
        assert {key: returned[key] for key in entry if key.startswith("eval_")}.items() <= entry.items()
        alone = trainer.evaluate(trainer.eval_dataset[name])
        assert {f"eval_{name}_{key}" for key in names[name]} == {
            key.replace("eval_", f"eval_{name}_", 1) for key in alone if key != "epoch"
        }
        for key in names[name] - SPEED:
            assert entry[f"eval_{name}_{key}"] == pytest.approx(alone[f"eval_{key}"], rel=1e-6), key
    assert returned["eval_a_rewards/chosen"] != returned["eval_b_c_rewards/chosen"]


def test_other_prefixes_and_predictions_keep_to_themselves(evaluating, dataset):
    trainer = evaluating(sets=dataset)
    before = trainer.evaluate()
    predicted = trainer.predict(trainer.eval_dataset.select(range(2))).metrics
    tested = trainer.evaluate(trainer.eval_dataset.select(range(2)), metric_key_prefix="test")
    after = trainer.evaluate()
    for key in ("rewards/margins", "apo/separated", "logps/chosen"):
        assert predicted[f"test_{key}"] == tested[f"test_{key}"]
        assert before[f"eval_{key}"] == after[f"eval_{key}"]
    assert tested["test_rewards/margins"] != before["eval_rewards/margins"]
    assert not any(key.startswith("eval_") for key in tested.keys() | predicted.keys())


@pytest.mark.parametrize("plain", [False, True], ids=["APOTrainer", "registered"])
@pytest.mark.parametrize(
    ("several", "metric"),
    [(False, "eval_rewards/margins"), (False, "apo/rejected_logratio_per_token"), (True, "eval_a_rewards/margins"),
     (True, "b_c_apo/rejected_logratio_per_token")],
)  # fmt: skip
def test_the_best_model_is_found_by_any_metric(several, metric, plain, train, dataset, tmp_path):
    sets = {name: dataset.select(part) for name, part in SETS.items()} if several else dataset
    greater = "margins" in metric
    if plain:
        register()
    try:
        trainer = train(
            *((DPOTrainer, DPOConfig) if plain else ()), eval_dataset=sets, eval_strategy="steps", eval_steps=2,
            steps=20, save_strategy="steps", save_steps=2, eval_on_start=True, load_best_model_at_end=True,
            learning_rate=1e-2, metric_for_best_model=metric, greater_is_better=not greater, loss_type="sigmoid",
            callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        )  # fmt: skip
    finally:
        unregister()
    # The worst model is the best: that of the first checkpoint, and then patience ends.
    assert trainer.state.best_model_checkpoint == str(tmp_path / "out" / "checkpoint-2")
    assert trainer.state.global_step == 6
    key = metric if metric.startswith("eval_") else f"eval_{metric}"
    assert trainer.evaluate()[key] == pytest.approx(trainer.state.best_metric, rel=1e-5)


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("streamed", [False, True])
def test_means_over_an_evaluation_do_not_depend_on_the_batch_size(streamed, padding_free, evaluating, dataset):
    part = dataset.select(range(5))
    settings = {"sets": part.to_iterable_dataset() if streamed else part, "padding_free": padding_free}
    alone, *others = (evaluating(size, **settings).evaluate() for size in (1, 2, 3, 4, 5))
    keys = [key for key in alone if key.startswith(("eval_rewards/", "eval_apo/", "eval_logps/"))]
    keys = [key for key in keys if key != "eval_apo/tokens_saved"] + ["eval_loss"] * (not streamed)
    assert len(keys) >= 14
    for other in others:
        assert {key: other[key] for key in keys} == pytest.approx({key: alone[key] for key in keys}, rel=1e-4, abs=1e-6)


def test_means_over_a_step_do_not_depend_on_its_micro_batches(evaluating, dataset):
    part = dataset.select(range(5))
    expected = evaluating(1, sets=part).evaluate()
    trainer = evaluating(sets=part, data=part, per_device_train_batch_size=2, gradient_accumulation_steps=3, steps=1)
    trainer.train()
    logged = trainer.state.log_history[0]
    for key in (
        "rewards/chosen",
        "rewards/accuracies",
        "rewards/margins",
        "apo/chosen_logratio_per_token",
        "logps/chosen",
    ):
        assert logged[key] == pytest.approx(expected[f"eval_{key}"], rel=1e-5), key
    assert logged["num_tokens"] == trainer._total_train_tokens


TWO_PROCESSES = """
import json, sys
sys.path.insert(0, sys.argv[2])
from datasets import Dataset
from apo_trl import APOConfig, APOTrainer
from conftest import make_model, rows
config = APOConfig(sys.argv[3], use_cpu=True, bf16=False, report_to="none", per_device_eval_batch_size=2)
pairs = Dataset.from_list(rows(5))
trainer = APOTrainer(sys.argv[1], ref_model=make_model(seed=1), args=config, train_dataset=pairs, eval_dataset=pairs)
metrics = trainer.evaluate()
if trainer.is_world_process_zero():
    print("METRICS", json.dumps(metrics))
"""


@pytest.mark.slow
def test_pairs_that_processes_repeat_count_once(evaluating, dataset, model_dir, tmp_path):
    """Five pairs in batches of two on two processes: accelerate fills the last one with three of them."""
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    hardware = ["--config_file", recipe_folder() / "accelerate" / "ddp.yaml", "--num_processes", "2"]
    launch = [BIN / "accelerate", "launch", *hardware, "--num_machines", "1", "--mixed_precision", "no"]
    done = command(*launch, tmp_path / "script.py", model_dir, Path(__file__).parent, tmp_path / "out")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.partition("METRICS ")[2].splitlines()[0])
    expected = evaluating(1, sets=dataset.select(range(5))).evaluate()
    keys = [key for key in expected if key.startswith(("eval_rewards/", "eval_apo/")) and "saved" not in key]
    assert {key: found[key] for key in keys} == pytest.approx({key: expected[key] for key in keys}, rel=1e-4, abs=1e-6)
