"""How many parts for how many rows: a table of intervals, measured where none of them says it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple


class Interval(NamedTuple):
    """So many rows, from the first to the last, are fastest in so many parts."""

    first: int
    last: int
    parts: int


class Intervals:
    """Numbers of parts by numbers of rows, disjoint and in order; more rows never have fewer parts.

    The granularity search of Zhang et al. 2023 (MPipeMoE): the best number of parts does not fall as rows become
    more, so that between two intervals only the numbers between theirs are candidates, and none has to be measured
    where both have the same.

    Args:
        found: intervals of another such table.

    Attributes:
        found: in order.
    """

    def __init__(self, found: Iterable[Interval] = ()) -> None:
        self.found = sorted(found)

    def parts_for(self, rows: int, candidates: Sequence[int], seconds: Callable[[int], float]) -> int:
        """The number of parts for so many rows; of equals the smallest.

        Args:
            rows: of a call.
            candidates: numbers of parts; one at least.
            seconds: of a call in so many parts; asked only where the table leaves a choice.
        """
        left = max((each for each in self.found if each.first <= rows), default=None)
        if left is not None and rows <= left.last:
            return left.parts
        right = min((each for each in self.found if each.first > rows), default=None)
        least = min(candidates) if left is None else left.parts
        most = max(candidates) if right is None else right.parts
        among = [parts for parts in sorted(candidates) if least <= parts <= most]
        parts = among[0] if len(among) == 1 else min(among, key=seconds)
        same = [each for each in (left, right) if each is not None and each.parts == parts]
        joined = Interval(min([rows, *(s.first for s in same)]), max([rows, *(s.last for s in same)]), parts)
        self.found = sorted([*(each for each in self.found if each not in same), joined])
        return parts
