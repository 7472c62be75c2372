"""What the metrics say about pairs whose regime is plain to see."""

import math

import pytest
import torch

from apo_trl.metrics import largest_slope, pair_metrics


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


def test_an_empty_completion_does_not_divide_by_zero():
    zero = torch.tensor([0])
    got = pair_metrics(torch.zeros(1), torch.zeros(1), chosen_lengths=zero, rejected_lengths=zero)
    assert got["chosen_logratio_per_token"].item() == 0


def test_largest_slope_of_known_losses():
    def dpo(chosen, rejected):  # beta * sigmoid(-margin) on both sides
        return 0.1 * math.sqrt(2) * torch.sigmoid(-0.1 * (chosen - rejected))

    assert largest_slope(dpo, beta=0.1) == pytest.approx(0.1 * math.sqrt(2), rel=1e-6)


def test_a_quadratic_has_no_largest_slope():
    assert math.isnan(largest_slope(lambda chosen, rejected: (chosen - rejected).abs(), beta=0.1))
