"""What training does to each side of a pair, from its two log-ratios.

A preference loss falls if chosen answers become likelier, and also if both answers become less likely and the rejected
one falls faster. Mean rewards hide the difference; the share of pairs in each regime shows it (`docs/metrics.md`).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["pair_metrics", "regimes"]


def regimes(chosen_logratio: Any, rejected_logratio: Any) -> dict[str, Any]:
    """Compute which regimes hold, for two numbers or for two tensors of shape (pairs,)."""
    return {
        "chosen_up": chosen_logratio > 0,
        "rejected_down": rejected_logratio < 0,
        "separated": (chosen_logratio > 0) & (rejected_logratio < 0),
        "displaced": (rejected_logratio < chosen_logratio) & (chosen_logratio < 0),
        "both_up": (chosen_logratio > 0) & (rejected_logratio > 0),
    }


def pair_metrics(
    chosen_logratios: "Tensor", rejected_logratios: "Tensor", *, chosen_lengths: "Tensor", rejected_lengths: "Tensor"
) -> dict[str, "Tensor"]:
    """Compute the regimes of each pair, as 0 or 1, and its log-ratios per token.

    Log-ratios are in nats and lengths in tokens, all of shape (pairs,), as are the values of the result. Their means
    over pairs are logged.
    """
    return {name: holds.float() for name, holds in regimes(chosen_logratios, rejected_logratios).items()} | {
        "chosen_logratio_per_token": chosen_logratios / chosen_lengths.clamp(min=1),
        "rejected_logratio_per_token": rejected_logratios / rejected_lengths.clamp(min=1),
    }
