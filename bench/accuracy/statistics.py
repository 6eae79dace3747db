"""Means and contrasts with their intervals, and what several of them at once are worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate from `n` runs, or from the smaller of two groups of them, and its 95 % interval.

    `p` is that of the hypothesis that the value is 0; None for a mean.
    """

    value: float
    low: float
    high: float
    n: int
    p: float | None = None

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def mean(values: Sequence[float]) -> Interval | None:
    """Student's interval; None for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    centre = float(numpy.mean(values))
    error = float(numpy.std(values, ddof=1)) / sqrt(n)
    reach = error * float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
    return Interval(centre, centre - reach, centre + reach, n)


def welch(a: Sequence[float], b: Sequence[float]) -> Interval | None:
    """The mean of `a` minus that of `b`, without assuming equal variances.

    None for fewer than two values in either, or if neither varies.
    """
    if min(len(a), len(b)) < 2 or len(set(a)) == len(set(b)) == 1:
        return None
    result = stats.ttest_ind(a, b, equal_var=False)
    low, high = result.confidence_interval(CONFIDENCE)
    value = float(numpy.mean(a) - numpy.mean(b))
    return Interval(value, float(low), float(high), min(len(a), len(b)), float(result.pvalue))


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p-values in the order given: one that is at most 0.05 may be believed."""
    order = sorted(range(len(p)), key=lambda index: p[index])
    adjusted = [1.0] * len(p)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min((len(p) - rank) * p[index], 1.0))
        adjusted[index] = largest
    return adjusted


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation over the places where both are finite; NaN for fewer than three."""
    pairs = numpy.array([a, b], dtype=float)
    pairs = pairs[:, numpy.isfinite(pairs).all(0)]
    if pairs.shape[1] < 3 or (pairs == pairs[:, :1]).all(1).any():
        return float("nan")
    return float(stats.spearmanr(pairs[0], pairs[1]).statistic)
