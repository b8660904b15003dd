"""Searches that measure as few candidates as they can."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def lowest(values: Sequence[T], cost: Callable[[T], float]) -> T:
    """The value of least cost, by ternary search; of equals one.

        asks about log_{3/2}(values) times two costs, where costs fall and then rise, and each at most once

    Args:
        values: in an order in which the cost falls first and rises then; one at least.
        cost: of a value.
    """
    known: dict[int, float] = {}

    def at(place: int) -> float:
        if place not in known:
            known[place] = cost(values[place])
        return known[place]

    first, last = 0, len(values) - 1
    while last - first > 2:
        third = (last - first) // 3
        left, right = first + third, last - third
        if at(left) <= at(right):
            last = right - 1
        else:
            first = left + 1
    return values[min(range(first, last + 1), key=at)]
