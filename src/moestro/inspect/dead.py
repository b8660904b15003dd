"""When an expert counts as dead; free of torch, since reports need it too."""

from __future__ import annotations

from collections.abc import Iterable


def dead_threshold(num_experts: int, experts_per_token: float) -> float:
    """The share of a layer's tokens below which an expert counts as dead.

    1 % of the tokens; a quarter of the fair share k / experts where that is less, since with hundreds of
    experts even a perfectly even load gives each of them about 1 %.
    """
    return min(0.01, experts_per_token / num_experts / 4)


def dead_experts(load: Iterable[float], experts_per_token: float) -> list[int]:
    """The experts whose share of the tokens lies below the threshold; `load` [experts] sums to 1."""
    load = list(load)
    threshold = dead_threshold(len(load), experts_per_token) if load else 0.0
    return [expert for expert, share in enumerate(load) if share * experts_per_token < threshold]
