"""Long curves made short enough for a screen."""

from __future__ import annotations

import math
from collections.abc import Sequence


def smoothed(values: Sequence[float]) -> list[float]:
    """Centred moving average over about 4 % of the curve."""
    reach = len(values) // 50
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    edges = [(max(i - reach, 0), min(i + reach + 1, len(values))) for i in range(len(values))]
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in edges]


def thinned(steps: Sequence[float], values: Sequence[float], most: int) -> tuple[list[int], list[float]]:
    """At most `most` points, each the mean of neighbouring ones."""
    times, columns = pooled([int(step) for step in steps], [[value] for value in values], most)
    return times, [column[0] for column in columns]


def pooled(steps: Sequence[int], rows: Sequence[Sequence[float]], most: int) -> tuple[list[int], list[list[float]]]:
    """At most `most` records, each the mean of neighbouring ones and dated by the last of them."""
    width = math.ceil(len(steps) / most) if steps else 1
    times, means = [], []
    for start in range(0, len(steps), width):
        group = rows[start : start + width]
        times.append(steps[min(start + width, len(steps)) - 1])
        means.append([sum(column) / len(group) for column in zip(*group, strict=True)])
    return times, means
