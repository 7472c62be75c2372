"""What a batch of log-ratios says about what training does to each side of a pair.

A falling preference loss can mean that chosen answers became likelier, or that both sides became less likely and the
rejected one fell faster. Mean rewards hide the difference; the share of pairs in each regime shows it.
`docs/metrics.md` says what to do about each.

Left out on purpose: everything that TRL logs already (rewards, margins, accuracies, log-probs, entropy).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from apo_trl.losses import PER_TOKEN_LOSSES

__all__ = ["SLOPES", "Saturation", "largest_slope", "pair_metrics", "regime"]

Slope = Callable[..., Tensor]

# How far rewards (beta times log-ratio) are looked at for the largest slope of a loss: sigmoid(20) is 1 - 2e-9.
_REACH = 20.0
_STEPS = 161


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


class Saturation:
    """Which pairs have saturated every preference loss of a mixture: 99 % of each one's largest slope is lost.

    A slope is the length of the gradient of a pair's loss with respect to its two log-ratios, in closed form
    (`SLOPES`). `sft` does not count: it looks at the chosen answer alone and pulls equally hard everywhere.
    """

    def __init__(self, slopes: dict[str, Slope], beta: float) -> None:
        self.slopes, self.beta = slopes, beta
        self.largest = {name: largest_slope(slope) for name, slope in slopes.items()}

    @classmethod
    def of(cls, losses: Sequence[str], config: Any) -> "Saturation | None":
        """Build it for the losses of a `DPOConfig`, or return None where a pair has no slope of its own.

        That is so for losses that sort the batch (`aot`, `aot_unpaired`), other divergences than the reverse KL, and
        losses that this package does not know.
        """
        losses = [name for name in losses if name != "sft"]
        if not losses or config.f_divergence_type != "reverse_kl" or not SLOPES.keys() >= set(losses):
            return None
        settings = {"beta": config.beta, "smoothing": config.label_smoothing, "tau": config.discopop_tau}
        return cls({name: functools.partial(SLOPES[name], **settings) for name in losses}, config.beta)

    def __call__(self, pairs: dict[str, Tensor]) -> Tensor:
        """Mark the saturated pairs with 1, shape (pairs,), from what the trainer knows of them."""
        saturated = torch.ones_like(pairs["chosen_logratios"], dtype=torch.bool)
        for name, slope in self.slopes.items():
            chosen, rejected = (
                self.beta * pairs[f"{side}_logratios"].float()
                / (pairs[f"{side}_lengths"].clamp(min=1) if name in PER_TOKEN_LOSSES else 1)
                for side in ("chosen", "rejected")
            )  # fmt: skip
            saturated &= slope(chosen, rejected, wins=pairs.get("chosen_wins")) < 0.01 * self.largest[name]
        return saturated.float()


def largest_slope(slope: Slope) -> float:
    """Return the largest slope of a loss over rewards from -20 to 20, or NaN if it has none: nothing is below NaN.

    A loss whose slope is larger still from -40 to 40, as that of `ipo` is, has no largest one and never saturates.
    """

    def steepest(reach: float) -> float:
        line = torch.linspace(-reach, reach, _STEPS, dtype=torch.float64)
        chosen, rejected = torch.cartesian_prod(line, line).unbind(1)
        return slope(chosen, rejected, wins=torch.ones_like(chosen)).max().item()

    near, far = steepest(_REACH), steepest(2 * _REACH)
    return near if far <= 1.01 * near else float("nan")


# Slopes, up to the factor beta, of rewards a = beta * chosen log-ratio and b = beta * rejected log-ratio, per token for
# the losses in PER_TOKEN. `wins` is the column chosen_wins; `settings` are those of the configuration.


def _bell(x: Tensor) -> Tensor:
    """The slope of a sigmoid."""
    return torch.sigmoid(x) * torch.sigmoid(-x)


def _of_margin(slope: Callable[..., Tensor]) -> Slope:
    """A loss of the margin alone pulls both sides equally."""
    return lambda a, b, **settings: math.sqrt(2) * slope(a - b, **settings).abs()


def _exo_pair(m: Tensor, *, smoothing: float, **_: Any) -> Tensor:
    wanted = math.log((1 - smoothing) / smoothing) if smoothing else math.inf
    return _bell(m) * (m - wanted)


def _robust(m: Tensor, *, smoothing: float, **_: Any) -> Tensor:
    return ((1 - smoothing) * torch.sigmoid(-m) + smoothing * torch.sigmoid(m)) / (1 - 2 * smoothing)


def _discopop(m: Tensor, *, tau: float, **_: Any) -> Tensor:
    share, turning = torch.sigmoid(m / tau), _bell(m / tau) / tau
    logistic, exponential = -torch.nn.functional.logsigmoid(m), torch.exp(-m)
    return -torch.sigmoid(-m) * (1 - share) - exponential * share + (exponential - logistic) * turning


def _ipo(m: Tensor, *, beta: float, **_: Any) -> Tensor:
    return 2 * (m / beta - 1 / (2 * beta)) / beta


def _apo_zero(a: Tensor, b: Tensor, **_: Any) -> Tensor:
    return torch.hypot(_bell(a), _bell(b))


def _apo_down(a: Tensor, b: Tensor, **_: Any) -> Tensor:
    return torch.hypot(_bell(a) - _bell(a - b), _bell(a - b))


def _apo_blend(a: Tensor, b: Tensor, *, wins: Tensor, **_: Any) -> Tensor:
    down = (1 - wins) * _bell(a - b)
    return torch.hypot((1 - 2 * wins) * _bell(a) - down, wins * _bell(b) + down)


def _nca_pair(a: Tensor, b: Tensor, **_: Any) -> Tensor:
    return torch.hypot(0.5 * torch.sigmoid(a) - torch.sigmoid(-a), 0.5 * torch.sigmoid(b))


def _bco_pair(a: Tensor, b: Tensor, **_: Any) -> Tensor:
    return torch.hypot(torch.sigmoid(-a), torch.sigmoid(b))


def _sppo_hard(a: Tensor, b: Tensor, *, beta: float, **_: Any) -> Tensor:
    return 2 * torch.hypot(a - 0.5, b + 0.5) / beta**2


SLOPES: dict[str, Slope] = {
    "sigmoid": _of_margin(lambda m, **_: torch.sigmoid(-m)),
    "sigmoid_norm": _of_margin(lambda m, **_: torch.sigmoid(-m)),
    "hinge": _of_margin(lambda m, **_: (m < 1).to(m.dtype)),
    "ipo": _of_margin(_ipo),
    "exo_pair": _of_margin(_exo_pair),
    "robust": _of_margin(_robust),
    "discopop": _of_margin(_discopop),
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_zero_norm": _apo_zero,
    "apo_down": _apo_down,
    "apo_down_norm": _apo_down,
    "apo_blend": _apo_blend,
}
"""The slope of each loss that looks at one pair at a time: TRL's, after its equations, and ours."""
