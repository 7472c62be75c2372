"""How sure a share or a mean is: textbook formulas, for which scipy would be a large thing to install."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Interval", "mean_interval", "probability_between", "wilson"]

_Z = 1.959963984540054  # of a normal distribution, 95 % lie within so many standard deviations


class Interval(NamedTuple):
    """An estimate and its 95 % confidence interval."""

    value: float
    low: float
    high: float


def wilson(successes: float, total: int) -> Interval:
    """Give a share with Wilson's score interval, which is never empty and never leaves [0, 1].

    Known values: 0 of 10 gives 0 to 0.278, 5 of 10 gives 0.237 to 0.763. Raises ValueError without any trial.
    """
    if total < 1:
        raise ValueError("A share needs at least one trial.")
    share, squared = successes / total, _Z**2 / total
    centre = (share + squared / 2) / (1 + squared)
    reach = math.sqrt(share * (1 - share) * squared + squared**2 / 4) / (1 + squared)
    return Interval(share, max(0.0, centre - reach), min(1.0, centre + reach))


def mean_interval(values: Sequence[float]) -> Interval:
    """Give a mean with the normal approximation of its interval; of a single value nothing is known but itself."""
    numbers = np.asarray(values, dtype=float)
    mean = float(numbers.mean())
    if len(numbers) < 2:
        return Interval(mean, -math.inf, math.inf)
    reach = _Z * float(numbers.std(ddof=1)) / math.sqrt(len(numbers))
    return Interval(mean, mean - reach, mean + reach)


def probability_between(successes: int, failures: int, low: float, high: float) -> float:
    """Give the probability that a share lies in [low, high] after so many trials.

    Of Jeffreys' posterior, Beta(successes + 1/2, failures + 1/2): every share is possible before the first trial.
    """
    # Substituting sin^2 of an angle for the share takes the posterior's poles at 0 and 1 away.
    edges = np.arcsin(np.sqrt([low, high]))
    angles = (np.arange(100_000) + 0.5) * (np.pi / 2 / 100_000)
    logs = 2 * (successes * np.log(np.sin(angles)) + failures * np.log(np.cos(angles)))
    density = np.exp(logs - logs.max())
    inside = (angles >= edges[0]) & (angles <= edges[1])
    return float(density[inside].sum() / density.sum())
