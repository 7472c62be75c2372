"""What a batch of log-ratios says about what training does to each side of a pair.

A falling preference loss can mean that chosen answers became likelier, or that both sides became less likely and the
rejected one fell faster. Mean rewards hide the difference; the share of pairs in each regime shows it.
`docs/metrics.md` says what to do about each.

Left out on purpose: everything that TRL logs already (rewards, margins, accuracies, log-probs, entropy).
"""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["largest_slope", "pair_metrics", "regime"]

# How far rewards (beta times log-ratio) are looked at for the largest slope of a loss: sigmoid(20) is 1 - 2e-9.
_REACH = 20.0
_STEPS = 81


def pair_metrics(
    chosen_logratios: Tensor, rejected_logratios: Tensor, *, chosen_lengths: Tensor, rejected_lengths: Tensor
) -> dict[str, Tensor]:
    """Name the regime that each pair is in, and give its log-ratios per token.

    Log-ratios in nats and lengths in tokens, all of shape (pairs,); so is every value of the result, whose means over
    pairs are what is logged. Regimes are 0 or 1; a pair exactly at the anchor is in none of them.
    """
    chosen_up, rejected_down = chosen_logratios > 0, rejected_logratios < 0
    regimes = {
        "chosen_up": chosen_up,
        "rejected_down": rejected_down,
        "separated": chosen_up & rejected_down,
        "displaced": (chosen_logratios > rejected_logratios) & (chosen_logratios < 0),
        "both_up": chosen_up & (rejected_logratios > 0),
    }
    return {name: pairs.float() for name, pairs in regimes.items()} | {
        "chosen_logratio_per_token": chosen_logratios / chosen_lengths.clamp(min=1),
        "rejected_logratio_per_token": rejected_logratios / rejected_lengths.clamp(min=1),
    }


def regime(chosen_logratio: float, rejected_logratio: float) -> str:
    """Name the one regime of a pair: "separated", "both_up" or "displaced", as `pair_metrics` tells them, or "other".

    The last is a pair whose margin is wrong while its chosen answer is not up, or that has a side at the anchor.
    """
    if chosen_logratio > 0 and rejected_logratio != 0:
        return "separated" if rejected_logratio < 0 else "both_up"
    return "displaced" if rejected_logratio < chosen_logratio < 0 else "other"


def largest_slope(slopes: Callable[[Tensor, Tensor], Tensor], *, beta: float) -> float:
    """Find the steepest pull that a loss can have on a pair; NaN, which nothing is below, where there is none.

    `slopes` gives the length of the gradient of each pair's loss with respect to its two log-ratios, (pairs,) and
    (pairs,) to (pairs,). It is looked at over all rewards from -20 to 20; a loss whose slope is larger still beyond
    that, as that of `ipo` is, has no largest one and never saturates.
    """

    def steepest(reach: float) -> float:
        line = torch.linspace(-reach, reach, _STEPS) / (beta or 1.0)
        chosen, rejected = torch.cartesian_prod(line, line).unbind(1)
        return slopes(chosen, rejected).max().item()

    near, far = steepest(_REACH), steepest(2 * _REACH)
    return near if far <= 1.01 * near else float("nan")
