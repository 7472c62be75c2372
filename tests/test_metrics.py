"""What the metrics say about pairs whose regime is plain to see."""

import math
from types import SimpleNamespace

import pytest
import torch
from trl import DPOConfig

from apo_trl.config import TRL_LOSSES
from apo_trl.losses import LOSSES
from apo_trl.metrics import REGIMES, pair_metrics, regime
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
