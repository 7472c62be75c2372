"""The share of pairs that no longer train: each loss has less than 1 % of its largest slope left on them.

The slope of a pair is the length of the gradient of its loss with respect to its two rewards.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apo_trl.losses import LOSSES, PER_TOKEN_LOSSES, apply_loss

__all__ = ["PAIR_LOSSES", "Saturation", "largest_slope", "slope"]

PAIR_LOSSES = frozenset({
    *LOSSES, "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard",
    "discopop",
})  # fmt: skip
"""The losses in which each pair has a slope of its own: not those that sort the batch, and not `sft`."""


def slope(name: str, chosen: Tensor, rejected: Tensor, config: Any, chosen_wins: Tensor | None = None) -> Tensor:
    """Compute the slope of each pair under one of `PAIR_LOSSES`; all tensors have shape (pairs,).

    `chosen` and `rejected` are rewards, per token for `PER_TOKEN_LOSSES`; `config` is the `DPOConfig` of the run.
    """
    with torch.enable_grad():
        chosen, rejected = chosen.detach().requires_grad_(), rejected.detach().requires_grad_()
        if name in LOSSES:
            pairs = {"chosen_logratios": chosen, "rejected_logratios": rejected, "chosen_wins": chosen_wins}
            lengths = dict.fromkeys(("chosen_lengths", "rejected_lengths"), torch.ones_like(chosen))
            losses = apply_loss(LOSSES[name], pairs | lengths, beta=1.0)
        else:
            from apo_trl.trl_losses import EQUATIONS

            losses = EQUATIONS[name](chosen, rejected, config)
        return torch.hypot(*torch.autograd.grad(losses.sum(), (chosen, rejected), materialize_grads=True))


def largest_slope(name: str, config: Any) -> float:
    """Return the largest slope over rewards from -20 to 20, or NaN if it grows up to 40: `ipo` never saturates."""

    def steepest(reach: float) -> float:
        line = torch.linspace(-reach, reach, 161, dtype=torch.float64)
        chosen, rejected = torch.cartesian_prod(line, line).unbind(1)
        return slope(name, chosen, rejected, config, torch.ones_like(chosen)).max().item()

    near, far = steepest(20.0), steepest(40.0)
    return near if far <= 1.01 * near else float("nan")


class Saturation:
    """Mark the pairs that are saturated under every preference loss of a mixture; `sft` does not count.

    `losses` holds their largest slopes. It is empty if one of them is not in `PAIR_LOSSES`.
    """

    def __init__(self, names: Sequence[str], config: Any) -> None:
        names = [name for name in names if name != "sft"]
        known = PAIR_LOSSES.issuperset(names) and config.f_divergence_type == "reverse_kl"
        self.config = config
        self.losses = {name: largest_slope(name, config) for name in names} if known else {}

    def __call__(self, pairs: dict[str, Tensor]) -> Tensor:
        """Return 1 for each saturated pair and 0 for the others, shape (pairs,)."""
        saturated = torch.ones_like(pairs["chosen_logratios"], dtype=torch.bool)
        for name, largest in self.losses.items():
            chosen, rejected = (
                self.config.beta * pairs[f"{side}_logratios"].float()
                / (pairs[f"{side}_lengths"].clamp(min=1) if name in PER_TOKEN_LOSSES else 1)
                for side in ("chosen", "rejected")
            )  # fmt: skip
            saturated &= slope(name, chosen, rejected, self.config, pairs.get("chosen_wins")) < 0.01 * largest
        return saturated.float()
