"""What the chains share: how they are run, slice sampling, and how well they have mixed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import gammaln

from moestro.mixtures.numerics import Array

_LONGEST = 20  # steps out on each side


@dataclass(frozen=True)
class Schedule:
    """Sweeps to forget, draws to keep, sweeps per kept draw; `verbose` reports every tenth sweep."""

    n_burn: int
    n_samples: int
    thin: int
    verbose: int

    @property
    def total(self) -> int:
        return self.n_burn + self.n_samples * self.thin


class Chain(ABC):
    """A state and the moves that leave the posterior as it is; `draws` are the states that were kept.

    A draw has `label`, `num_experts` and `log_likelihood`.
    """

    draws: list[Any]

    @abstractmethod
    def sweep(self) -> None:
        """Moves everything once."""

    @abstractmethod
    def state(self) -> Any:
        """What is kept of one sweep."""


def run_chain(make: Callable[[int], Chain], seed: int, schedule: Schedule, number: int) -> Chain:
    """The chain of a seed after all its sweeps."""
    chain = make(seed)
    chain.draws = []
    for sweep in range(1, schedule.total + 1):
        chain.sweep()
        if sweep > schedule.n_burn and (sweep - schedule.n_burn) % schedule.thin == 0:
            chain.draws.append(chain.state())
        if schedule.verbose and sweep % 10 == 0:
            experts = chain.state().num_experts
            print(f"chain {number}, sweep {sweep}/{schedule.total}: {experts} experts", flush=True)
    return chain


def log_concentration_density(log_value: float, num_rows: int) -> float:
    """Of the concentration given how many rows there are, up to what depends on the number of experts alone."""
    value = float(np.exp(log_value))
    if not 0 < value < np.inf:
        return -np.inf
    return float(gammaln(value) - gammaln(num_rows + value))


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
