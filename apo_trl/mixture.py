"""The terms of a mixture of losses, which TRL sums and does not log."""

from typing import Any

from torch import Tensor

__all__ = ["RecordingWeight"]


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
