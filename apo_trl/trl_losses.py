"""TRL's losses: their equations, for their slopes, and their terms in a mixture, which TRL sums and does not log.

Imported only if a run uses one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = ["EQUATIONS", "RecordingWeight"]


def _exo_pair(margin: Tensor, smoothing: float) -> Tensor:
    chosen, rejected = torch.tensor(1 - smoothing).log(), torch.tensor(smoothing).log()
    return margin.sigmoid() * (logsigmoid(margin) - chosen) + (-margin).sigmoid() * (logsigmoid(-margin) - rejected)


def _robust(margin: Tensor, smoothing: float) -> Tensor:
    return (smoothing * logsigmoid(-margin) - (1 - smoothing) * logsigmoid(margin)) / (1 - 2 * smoothing)


def _discopop(margin: Tensor, tau: float) -> Tensor:
    share = torch.sigmoid(margin / tau)
    return share * torch.exp(-margin) - (1 - share) * logsigmoid(margin)


EQUATIONS: dict[str, Callable[[Tensor, Tensor, Any], Tensor]] = {
    "sigmoid": lambda a, b, s: -logsigmoid(a - b),
    "sigmoid_norm": lambda a, b, s: -logsigmoid(a - b),
    "hinge": lambda a, b, s: torch.relu(1 - (a - b)),
    "ipo": lambda a, b, s: ((a - b - 0.5) / s.beta) ** 2,
    "exo_pair": lambda a, b, s: _exo_pair(a - b, s.label_smoothing),
    "nca_pair": lambda a, b, s: -logsigmoid(a) - 0.5 * logsigmoid(-a) - 0.5 * logsigmoid(-b),
    "robust": lambda a, b, s: _robust(a - b, s.label_smoothing),
    "bco_pair": lambda a, b, s: -logsigmoid(a) - logsigmoid(-b),
    "sppo_hard": lambda a, b, s: ((a - 0.5) ** 2 + (b + 0.5) ** 2) / s.beta**2,
    "discopop": lambda a, b, s: _discopop(a - b, s.discopop_tau),
}
"""The losses of single pairs: a and b are the rewards of chosen and rejected, and s is the `DPOConfig`."""


class RecordingWeight:
    """A weight of a TRL loss that records the term it multiplies."""

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.term: Any = None

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Multiply, with the weight on either side."""
        weight = next(value for value in args if isinstance(value, cls))
        weight.term = next(value for value in args if isinstance(value, Tensor)).detach()
        return function(*(value.weight if isinstance(value, cls) else value for value in args), **(kwargs or {}))
