"""The regime of a pair: which of those that exclude each other."""

from apo_trl.metrics import regimes

__all__ = ["REGIMES", "regime"]

REGIMES = ("separated", "both_up", "displaced")
"""The regimes that exclude each other; a pair outside of them has a wrong margin or a side at the anchor."""


def regime(chosen_logratio: float, rejected_logratio: float) -> str:
    """Return the one of `REGIMES` that a pair is in, or "other"."""
    holds = regimes(chosen_logratio, rejected_logratio)
    return next((name for name in REGIMES if holds[name]), "other")
