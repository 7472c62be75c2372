"""Confidence intervals of shares and means: textbook formulas, without scipy."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

__all__ = ["Interval", "mean_interval", "probability_between", "wilson"]

_Z = NormalDist().inv_cdf(0.975)  # 95 % of a normal distribution lie within this many standard deviations


class Interval(NamedTuple):
    """An estimate and its 95 % confidence interval."""

    value: float
    low: float
    high: float


def wilson(successes: float, total: int) -> Interval:
    """Compute a share with Wilson's score interval: 0 of 10 gives 0 to 0.278, 5 of 10 gives 0.237 to 0.763."""
    share, squared = successes / total, _Z**2 / total
    centre = (share + squared / 2) / (1 + squared)
    reach = math.sqrt(share * (1 - share) * squared + squared**2 / 4) / (1 + squared)
    return Interval(share, max(0.0, centre - reach), min(1.0, centre + reach))


def mean_interval(values: Sequence[float]) -> Interval:
    """Compute a mean with the normal approximation of its interval, which is infinite for a single value."""
    numbers = np.asarray(values, dtype=float)
    mean = float(numbers.mean())
    reach = _Z * float(numbers.std(ddof=1)) / math.sqrt(len(numbers)) if len(numbers) > 1 else math.inf
    return Interval(mean, mean - reach, mean + reach)


def probability_between(successes: int, failures: int, low: float, high: float) -> float:
    """Compute the probability that a share is in [low, high], by Jeffreys' Beta(successes + 1/2, failures + 1/2)."""
    # Substituting sin^2 of an angle for the share removes the posterior's poles at 0 and 1.
    edges = np.arcsin(np.sqrt([low, high]))
    angles = (np.arange(100_000) + 0.5) * (np.pi / 2 / 100_000)
    logs = 2 * (successes * np.log(np.sin(angles)) + failures * np.log(np.cos(angles)))
    density = np.exp(logs - logs.max())
    inside = (angles >= edges[0]) & (angles <= edges[1])
    return float(density[inside].sum() / density.sum())
