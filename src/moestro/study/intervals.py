"""Means with 95 % intervals of a few values; imports no torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its 95 % interval; the half width is None with fewer than two values."""

    mean: float
    half_width: float | None

    @property
    def holds_zero(self) -> bool | None:
        """Whether zero lies in the interval; None when there is no interval."""
        return None if self.half_width is None else abs(self.mean) <= self.half_width


def interval(values: Sequence[float]) -> Interval:
    """The mean of independent values and its 95 % interval by Student's t distribution.

        mean ± t(0.975; n - 1) s / sqrt(n)        s² = sum (value - mean)² / (n - 1)

    Raises:
        ValueError: no value.
    """
    if not values:
        raise ValueError("there is no value to average; pass at least one")
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, None)
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, student_quantile((1 + CONFIDENCE) / 2, len(values) - 1) * spread)


def least_significant_difference(table: Sequence[Sequence[float]]) -> float | None:
    """By how much two methods must differ before these seeds tell them apart, from all of them together.

        LSD = t(0.975; (m - 1)(n - 1)) s sqrt(2 / n)        Fisher 1935, randomised blocks

    where s² is what is left of the variation after methods and seeds have explained theirs. It takes the noise of
    all methods for equal, and so needs fewer seeds than an interval of each pair does.

    Args:
        table: `[methods][seeds]`.

    Returns: None with fewer than two methods or seeds.
    """
    m, n = len(table), len(table[0]) if table else 0
    if m < 2 or n < 2:
        return None
    by_method = [statistics.fmean(row) for row in table]
    by_seed = [statistics.fmean(column) for column in zip(*table, strict=True)]
    mean, degrees = statistics.fmean(by_method), (m - 1) * (n - 1)
    left = sum((table[i][j] - by_method[i] - by_seed[j] + mean) ** 2 for i in range(m) for j in range(n))
    return student_quantile((1 + CONFIDENCE) / 2, degrees) * math.sqrt(2 / n * left / degrees)


def student_quantile(probability: float, degrees: int) -> float:
    """The value below which a t-distributed variable lies with `probability`, for whole degrees of freedom.

    Found by bisection of the finite series of Abramowitz and Stegun 1964, 26.7.3 and 26.7.4.

    Raises:
        ValueError: a probability outside (0.5, 1), or less than one degree of freedom.
    """
    if not 0.5 < probability < 1 or degrees < 1:
        raise ValueError(
            f"probability={probability}, degrees={degrees}; pass 0.5 < probability < 1 and degrees >= 1"
        )
    low, high = 0.0, math.pi / 2  # angles: t = sqrt(degrees) tan(angle)
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _central(middle, degrees) < 2 * probability - 1 else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _central(angle: float, degrees: int) -> float:
    """Probability that |t| is below sqrt(degrees) tan(angle)."""
    odd = degrees % 2
    term, total = (math.cos(angle), 0.0) if odd else (1.0, 0.0)
    for i in range(1 + odd, degrees, 2):
        total += term
        term *= math.cos(angle) ** 2 * i / (i + 1)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
