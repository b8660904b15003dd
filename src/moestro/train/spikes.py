"""A loss that jumps: worth a line while there is still a checkpoint before it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

WINDOW, FEWEST, DEVIATIONS = 50, 20, 6.0


def spike(before: Sequence[float], loss: float) -> float | None:
    """By how many standard deviations a loss exceeds the mean of the last 50, if by more than 6; None otherwise.

    Fewer than 20 losses before it are no ground to judge by. It reads recorded losses and keeps no state, so a
    resumed run judges as the uninterrupted one.
    """
    recent = before[-WINDOW:]
    if len(recent) < FEWEST:
        return None
    deviation = statistics.pstdev(recent)
    distance = (loss - statistics.fmean(recent)) / max(deviation, 1e-12)
    return distance if distance > DEVIATIONS else None
