"""What the samplers share: slice sampling, and how well a chain has mixed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moestro.mixtures.numerics import Array

_LONGEST = 20  # steps out on each side


def slice_sample(
    log_density: Callable[[float], float], at: float, width: float, rng: np.random.RandomState
) -> float:
    """One draw that leaves the density unchanged, by stepping out and shrinkage (Neal 2003)."""
    level = log_density(at) - rng.standard_exponential()
    low = at - width * rng.random_sample()
    high = low + width
    room = _LONGEST
    while room > 0 and log_density(low) > level:
        low, room = low - width, room - 1
    room = _LONGEST
    while room > 0 and log_density(high) > level:
        high, room = high + width, room - 1
    while True:
        tried = low + (high - low) * rng.random_sample()
        if log_density(tried) >= level:
            return tried
        if abs(tried - at) < 1e-12 * max(1.0, abs(at)):
            return at
        low, high = (tried, high) if tried < at else (low, tried)


def split_chains(chains: Array) -> Array:
    """Every chain cut in two. Shapes: `[chains, draws]` -> `[2 chains, draws // 2]`."""
    half = chains.shape[1] // 2
    return np.concatenate([chains[:, :half], chains[:, -half:]])


def potential_scale_reduction(chains: Array) -> float:
    """Split R-hat of Gelman et al. 2013: near 1 when all halves of all chains tell the same; nan below 4 draws."""
    if chains.shape[1] < 4:
        return float("nan")
    parts = split_chains(chains)
    within = parts.var(axis=1, ddof=1).mean()
    between = parts.shape[1] * parts.mean(axis=1).var(ddof=1)
    if within == 0:
        return 1.0 if between == 0 else float("inf")
    n = parts.shape[1]
    return float(np.sqrt(((n - 1) / n * within + between / n) / within))


def effective_sample_size(chains: Array) -> float:
    """Independent draws that the chains are worth (Geyer 1992, positive pairs; Gelman et al. 2013, eq. 11.8)."""
    if chains.shape[1] < 4:
        return float("nan")
    parts = split_chains(chains)
    num, n = parts.shape
    centred = parts - parts.mean(axis=1, keepdims=True)
    within = (centred**2).sum(1).mean() / (n - 1)
    pooled = (n - 1) / n * within + parts.mean(axis=1).var(ddof=1)
    if pooled == 0:
        return float(num * n)
    correlation = np.empty(n)
    for lag in range(n):
        gap = ((parts[:, lag:] - parts[:, : n - lag]) ** 2).mean()
        correlation[lag] = 1 - gap / (2 * pooled)
    pairs = correlation[0 : n - n % 2 : 2] + correlation[1 : n - n % 2 + 1 : 2]
    last = int(np.argmax(pairs <= 0)) if (pairs <= 0).any() else len(pairs)
    time = max(2 * float(pairs[:last].sum()) - 1, 1 / np.log10(max(num * n, 10)))
    return float(min(num * n / time, num * n * np.log10(max(num * n, 10))))


def diagnose(traces: dict[str, Array]) -> dict[str, dict[str, float]]:
    """Mean, deviation, effective sample size and split R-hat of every trace `[chains, draws]`."""
    return {
        name: {
            "mean": float(trace.mean()),
            "std": float(trace.std()),
            "effective_sample_size": effective_sample_size(trace),
            "r_hat": potential_scale_reduction(trace),
        }
        for name, trace in traces.items()
    }
