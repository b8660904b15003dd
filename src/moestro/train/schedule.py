"""Learning-rate schedules: what share of the peak each step gets."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


def cosine(x: float, decay_fraction: float, final: float) -> float:
    """Half a cosine from 1 to `final` (Loshchilov & Hutter 2017, eq. 5, one cycle)."""
    return final + (1 - final) * (1 + math.cos(math.pi * x)) / 2


def warmup_stable_decay(x: float, decay_fraction: float, final: float) -> float:
    """Constant, then a straight line down to `final` over the last `decay_fraction` (Hu et al. 2024, MiniCPM)."""
    return 1 - (1 - final) * max(0.0, 1 - (1 - x) / decay_fraction)


def constant(x: float, decay_fraction: float, final: float) -> float:
    """The peak to the end."""
    return 1.0


_SHAPES = {"cosine": cosine, "wsd": warmup_stable_decay, "constant": constant}


def schedule(
    name: str, *, steps: int, warmup_fraction: float, decay_fraction: float = 0.2, final_fraction: float = 0.1
) -> Schedule:
    """The share of the peak learning rate at each step.

        share(t) = (t + 1) / warmup                       t < warmup = round(warmup_fraction · steps)
        share(t) = shape((t - warmup) / (steps - 1 - warmup))    afterwards

    The last step of the warm-up has the peak and the last step of the run has `final_fraction`.

    Args:
        name: cosine, wsd (warm-up, stable, decay) or constant.
        steps: optimiser steps of the run.
        warmup_fraction: share of the steps that warms up.
        decay_fraction: wsd only: share of all steps that decays.
        final_fraction: share of the peak at the end; the constant schedule ignores it.
    """
    shape = _SHAPES[name]
    warmup = round(warmup_fraction * steps)
    rest = max(1, steps - 1 - warmup)
    decay = min(1.0, decay_fraction * steps / rest)

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return shape(min(1.0, (step - warmup) / rest), decay, final_fraction)

    return share
