"""Expert load as one line of text, for the progress display of a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

_BLOCKS = "▁▂▃▄▅▆▇█"


def load_strip(shares: Sequence[float], width: int = 64) -> str:
    """Draws one block per expert: ▄ is the fair share, █ twice the fair share or more, ▁ almost nothing.

    Args:
        shares: load of every expert, `[experts]`, in any unit (only the proportions count).
        width: widest strip in characters; more experts than that are averaged in neighbouring groups.
    """
    fair = sum(shares) / len(shares) if len(shares) else 0.0
    groups = _grouped(shares, width)
    return "".join(_block(sum(group) / len(group), fair) for group in groups)


def _grouped(shares: Sequence[float], width: int) -> list[Sequence[float]]:
    """Splits the experts into at most `width` neighbouring groups of nearly equal size."""
    count = min(len(shares), width)
    edges = [i * len(shares) // count for i in range(count + 1)] if count else []
    return [shares[start:stop] for start, stop in pairwise(edges)]


def _block(share: float, fair: float) -> str:
    """The fair share fills half of the cell, so that twice as much still fits."""
    if not fair > 0:
        return _BLOCKS[0]
    eighths = round(4 * min(share / fair, 2.0))
    return _BLOCKS[max(eighths, 1) - 1]
