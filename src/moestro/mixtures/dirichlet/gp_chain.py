"""One Markov chain of the infinite mixture of Gaussian process experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy.special import xlogy

from moestro.mixtures.dirichlet.mcmc import Chain, log_concentration_density, slice_sample
from moestro.mixtures.numerics import Array, softmax_rows

_JITTER = 1e-6  # smallest noise
_PRIOR_MEAN = (0.0, float(np.log(0.1)), 0.0)  # of log v0, log v1, log w


class Hyper(NamedTuple):
    """Signal variance v0, noise variance v1 and length scales w `[features]` of one expert."""

    signal: float
    noise: float
    length: Array

    def logs(self) -> Array:
        return np.log(np.concatenate([[self.signal, self.noise], self.length]))

    @classmethod
    def of(cls, logs: Array) -> Hyper:
        numbers = np.exp(logs)
        return cls(float(numbers[0]), float(max(numbers[1], _JITTER)), numbers[2:])


class Draw(NamedTuple):
    """One state of the chain."""

    label: Array
    hyper: list[Hyper]
    alpha: float
    width: Array
    log_likelihood: float

    @property
    def num_experts(self) -> int:
        return len(self.hyper)


@dataclass(frozen=True)
class Settings:
    """How the chain starts and moves, and what is fixed instead of learned."""

    n_auxiliary: int
    alpha: float | None
    width: float | None
    hyperparameters: tuple[float, float, float] | None
    n_init_experts: int


def covariance(a: Array, b: Array, hyper: Hyper) -> Array:
    """Signal covariance `[rows a, rows b]`."""
    return hyper.signal * np.exp(-0.5 * _square(a / hyper.length, b / hyper.length))


def _square(a: Array, b: Array) -> Array:
    return np.maximum((a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1), 0.0)


def occupation(x: Array, seen: Array, label: Array, num: int, width: Array) -> Array:
    """Share of each expert in the kernel-weighted neighbours of x, `[rows, experts]`."""
    near = softmax_rows(-0.5 * _square(x / width, seen / width))[1]
    return near @ np.eye(num)[label]


def predictive(x: Array, seen: Array, y: Array, hyper: Hyper) -> tuple[Array, Array]:
    """Mean and variance of new targets under one expert, `[rows]` each."""
    lower = np.linalg.cholesky(covariance(seen, seen, hyper) + hyper.noise * np.eye(len(seen)))
    half = np.linalg.solve(lower, covariance(seen, x, hyper))
    return half.T @ np.linalg.solve(lower, y), hyper.signal + hyper.noise - (half**2).sum(0)


def draw_prior(width: int, count: int, rng: np.random.RandomState) -> list[Hyper]:
    """Hyperparameters of empty experts."""
    center = np.concatenate([_PRIOR_MEAN[:2], np.full(width, _PRIOR_MEAN[2])])
    return [Hyper.of(center + rng.standard_normal(len(center))) for _ in range(count)]


def log_evidence(x: Array, y: Array, hyper: Hyper) -> float:
    """`log N(y; 0, Q)` of one expert's rows."""
    try:
        lower = np.linalg.cholesky(covariance(x, x, hyper) + hyper.noise * np.eye(len(x)))
    except np.linalg.LinAlgError:
        return -np.inf
    white = np.linalg.solve(lower, y)
    return -0.5 * float(white @ white) - float(np.log(np.diag(lower)).sum()) - 0.5 * len(x) * np.log(2 * np.pi)


@dataclass
class _Expert:
    """Members of one expert, the inverse of their covariance, and its hyperparameters.

    `signal` holds the covariance with all rows, so that rows may come and go by rank-one updates.
    """

    hyper: Hyper
    members: list[int]
    signal: Array
    inverse: Array = field(default_factory=lambda: np.zeros((0, 0)))

    def renew(self) -> None:
        inner = self.signal[np.ix_(self.members, self.members)] + self.hyper.noise * np.eye(len(self.members))
        self.inverse = np.linalg.inv(inner)
        self.inverse = 0.5 * (self.inverse + self.inverse.T)

    def remove(self, row: int) -> None:
        at = self.members.index(row)
        keep = np.delete(np.arange(len(self.members)), at)
        column = self.inverse[keep, at]
        self.inverse = self.inverse[np.ix_(keep, keep)] - np.outer(column, column) / self.inverse[at, at]
        del self.members[at]

    def add(self, row: int) -> None:
        cross = self.signal[row, self.members]
        pull = self.inverse @ cross
        gap = self.signal[row, row] + self.hyper.noise - cross @ pull
        size = len(self.members)
        grown = np.empty((size + 1, size + 1))
        grown[:size, :size] = self.inverse + np.outer(pull, pull) / gap
        grown[:size, size] = grown[size, :size] = -pull / gap
        grown[size, size] = 1 / gap
        self.inverse = grown
        self.members.append(row)

    def log_density(self, row: int, y: Array) -> float:
        """Of the row's target given the members, which must not hold the row."""
        cross = self.signal[row, self.members]
        pull = self.inverse @ cross
        variance = self.signal[row, row] + self.hyper.noise - cross @ pull
        return _log_normal(y[row] - pull @ y[self.members], max(float(variance), _JITTER))


def _log_normal(gap: float, variance: float) -> float:
    return float(-0.5 * (gap * gap / variance + np.log(2 * np.pi * variance)))


class GPChain(Chain):
    """The state, and the moves that leave the posterior as it is."""

    def __init__(self, x: Array, y: Array, settings: Settings, seed: int):
        self.x, self.y, self.settings = x, y, settings
        self.rng = np.random.RandomState(seed)
        self.alpha = settings.alpha or 1.0
        self.width = np.full(x.shape[1], settings.width or 0.5)
        self.tried = self.taken = 0
        self.label = np.zeros(len(x), dtype=np.int64)
        order = np.argsort(x[:, 0], kind="stable")
        for block, rows in enumerate(np.array_split(order, settings.n_init_experts)):
            self.label[rows] = block
        start = Hyper(1.0, 0.1, np.ones(x.shape[1])) if settings.hyperparameters is None else self._fixed()
        self.experts = [
            self._expert(start, np.flatnonzero(self.label == j).tolist()) for j in range(settings.n_init_experts)
        ]

    def _fixed(self) -> Hyper:
        assert self.settings.hyperparameters is not None
        signal, length, noise = self.settings.hyperparameters
        return Hyper(signal, noise, np.full(self.x.shape[1], length))

    def _expert(self, hyper: Hyper, members: list[int]) -> _Expert:
        made = _Expert(hyper, members, covariance(self.x, self.x, hyper))
        made.renew()
        return made

    @property
    def acceptance(self) -> float:
        return self.taken / self.tried if self.tried else float("nan")

    def state(self) -> Draw:
        """What is kept of one sweep."""
        value = sum(log_evidence(self.x[each.members], self.y[each.members], each.hyper) for each in self.experts)
        hyper = [each.hyper for each in self.experts]
        return Draw(self.label.copy(), hyper, self.alpha, self.width.copy(), float(value))

    def sweep(self) -> None:
        """All labels, then the hyperparameters, α and φ."""
        near = self._near(self.width)
        for row in range(len(self.x)):
            self._move(row, near[row])
        if self.settings.hyperparameters is None:
            for each in self.experts:
                self._hyper_step(each)
        for each in self.experts:
            each.renew()
        if self.settings.alpha is None:
            self.alpha = float(np.exp(slice_sample(self._alpha_density, np.log(self.alpha), 1.0, self.rng)))
        if self.settings.width is None:
            self._width_step()

    def _near(self, width: Array) -> Array:
        """Kernel weights of the other rows, each row summing to one, `[rows, rows]`."""
        logits = -0.5 * _square(self.x / width, self.x / width)
        np.fill_diagonal(logits, -np.inf)
        return softmax_rows(logits)[1] if len(self.x) > 1 else np.zeros((1, 1))

    def log_densities(self, row: int) -> Array:
        """Of the row's target under every expert, `[experts]`."""
        return np.array([each.log_density(row, self.y) for each in self.experts])

    def log_empty(self, row: int, hyper: list[Hyper]) -> Array:
        """Of the row's target under empty experts."""
        return np.array([_log_normal(float(self.y[row]), each.signal + each.noise) for each in hyper])

    def _move(self, row: int, near: Array) -> None:
        settings, n = self.settings, len(self.x)
        own = int(self.label[row])
        self.experts[own].remove(row)
        offered = draw_prior(self.x.shape[1], settings.n_auxiliary, self.rng)
        if settings.hyperparameters is not None:
            offered = [self._fixed()] * settings.n_auxiliary
        if not self.experts[own].members:  # its expert is the first empty one on offer
            offered[0] = self.experts[own].hyper
            del self.experts[own]
            self.label[self.label > own] -= 1
        held = self.label.copy()
        held[row] = len(self.experts)  # nobody's
        count = (n - 1) * np.bincount(held, weights=near, minlength=len(self.experts) + 1)[: len(self.experts)]
        with np.errstate(divide="ignore"):
            known = np.log(count) + self.log_densities(row)
        empty = np.log(self.alpha / settings.n_auxiliary) + self.log_empty(row, offered)
        share = softmax_rows(np.concatenate([known, empty])[None])[1][0]
        chosen = min(int((share.cumsum() < self.rng.random_sample()).sum()), len(share) - 1)
        if chosen < len(self.experts):
            self.experts[chosen].add(row)
            self.label[row] = chosen
        else:
            self.experts.append(self._expert(offered[chosen - len(known)], [row]))
            self.label[row] = len(self.experts) - 1

    def _hyper_step(self, each: _Expert) -> None:
        logs = each.hyper.logs()
        center = np.concatenate([_PRIOR_MEAN[:2], np.full(len(logs) - 2, _PRIOR_MEAN[2])])
        x, y = self.x[each.members], self.y[each.members]
        for k in self.rng.permutation(len(logs)):
            logs[k] = slice_sample(_along(logs, k, center, x, y), float(logs[k]), 1.0, self.rng)
        each.hyper = Hyper.of(logs)
        each.signal = covariance(self.x, self.x, each.hyper)

    def _alpha_density(self, log_alpha: float) -> float:
        """Of log α given the number of experts (Rasmussen 2000, eq. 15, times α for the logarithm)."""
        power = (len(self.experts) - 0.5) * log_alpha - 0.5 * float(np.exp(-log_alpha))
        return power + log_concentration_density(log_alpha, len(self.x))

    def _width_density(self, width: Array) -> float:
        """Pseudo-likelihood of the labels and a log-normal prior around 0.5."""
        held = (self._near(width) * (self.label[:, None] == self.label)).sum(1) * (len(self.x) - 1)
        alone = np.bincount(self.label)[self.label] == 1
        value = xlogy(1.0, np.maximum(np.where(alone, self.alpha, held), 1e-300)).sum()
        return float(value) - 0.5 * float(((np.log(width) - np.log(0.5)) ** 2).sum())

    def _width_step(self) -> None:
        now = self._width_density(self.width)
        for k in range(len(self.width)):
            tried = self.width.copy()
            tried[k] *= np.exp(0.4 * self.rng.standard_normal())
            value = self._width_density(tried)
            self.tried += 1
            if np.log(self.rng.random_sample()) < value - now:
                self.width, now = tried, value
                self.taken += 1


def _along(logs: Array, k: int, center: Array, x: Array, y: Array) -> Callable[[float], float]:
    """Posterior density of one log hyperparameter, the others as they are."""

    def density(value: float) -> float:
        if abs(value - center[k]) > 12:
            return -np.inf
        tried = logs.copy()
        tried[k] = value
        return log_evidence(x, y, Hyper.of(tried)) - 0.5 * (value - float(center[k])) ** 2

    return density
