"""When a climbing path has arrived."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Stop = Callable[[Sequence[float], float], bool]


def by_change(path: Sequence[float], enough: float) -> bool:
    """The last step changed the objective by less than enough."""
    return len(path) > 1 and abs(path[-1] - path[-2]) < enough


def by_aitken(path: Sequence[float], enough: float) -> bool:
    """What is left to climb, if the steps go on shrinking as the last two did, is less than enough.

        a = (l₂ - l₁) / (l₁ - l₀),    l∞ = l₁ + (l₂ - l₁) / (1 - a),    0 <= l∞ - l₂ < enough    Böhning et al. 1994

    A slow fit shrinks its steps by little, and a small step says nothing about how far it still has to go.
    """
    if len(path) > 1 and path[-1] == path[-2]:
        return True
    if len(path) < 3:
        return False
    before, now = path[-2] - path[-3], path[-1] - path[-2]
    return 0 <= now < before and now * now / (before - now) < enough


STOPPING: dict[str, Stop] = {"change": by_change, "aitken": by_aitken}
