"""Quantiles of a mixture of experts by bisection of its distribution function."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moestro.mixtures.mixture import Mixture
from moestro.mixtures.numerics import Array

_HALVINGS = 60


def mixture_quantile(mixture: Mixture, u: Array, z: Array, level: float) -> Array:
    """Smallest y with `sum_i g_i(x) F_i(y | x) >= level`, for each output alone.

    Shapes: u `[rows, gate features]`, z `[rows, expert features]` -> `[rows, outputs]`.
    """
    share = mixture.share(u)[:, :, None]
    mean = mixture.expert.mean(mixture.expert_params, z)
    discrete = mixture.expert.target == "count"

    def below(y: Array) -> Array:
        return (share * mixture.expert.cdf(mixture.expert_params, z, y)).sum(1)

    low, high = _bracket(below, mean.min(1), mean.max(1), level)
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        short = below(middle) < level
        low, high = np.where(short, middle, low), np.where(short, high, middle)
    return np.floor(high + 1e-6) if discrete else 0.5 * (low + high)


def _bracket(below: Callable[[Array], Array], low: Array, high: Array, level: float) -> tuple[Array, Array]:
    """Doubles the range of the means until it holds the quantile of every row."""
    step = np.maximum(high - low, 1.0)
    for _ in range(200):
        outside = below(low) >= level
        if not outside.any():
            break
        low, step = np.where(outside, low - step, low), np.where(outside, 2 * step, step)
    step = np.maximum(high - low, 1.0)
    for _ in range(200):
        outside = below(high) < level
        if not outside.any():
            break
        high, step = np.where(outside, high + step, high), np.where(outside, 2 * step, step)
    return low, high
