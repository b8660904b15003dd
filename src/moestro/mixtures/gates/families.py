"""Densities of one input column that a generative gate can give to its experts.

Shapes everywhere: column x `[rows]`, weight `[rows]`, mass `[rows, experts]`, parameters `[experts, numbers]`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from scipy.special import digamma, gammaln

from moestro.mixtures.numerics import Array, gamma_peak, gamma_shape

_EDGE = 1e-6  # probabilities stay this far from 0 and 1, variances this far from 0 relative to the column's


class Family(ABC):
    """One kind of column: its support, its maximum likelihood fit, its density and its free numbers."""

    @abstractmethod
    def check(self, x: Array, column: int) -> None:
        """Raise ValueError for values outside the support."""

    @abstractmethod
    def fit(self, x: Array, weight: Array, mass: Array) -> Array:
        """Parameters of largest (penalised) likelihood for every expert's mass."""

    @abstractmethod
    def log_prob(self, params: Array, x: Array) -> Array:
        """Log-densities `[rows, experts]`."""

    @abstractmethod
    def free(self, params: Array) -> Array:
        """Unconstrained numbers `[experts, free numbers]`."""

    @abstractmethod
    def restore(self, numbers: Array) -> Array:
        """Inverse of `free`."""

    @abstractmethod
    def gradient(self, params: Array, x: Array, mass: Array) -> Array:
        """Gradient of the mass-weighted log-likelihood minus penalty in the free numbers."""

    def penalty(self, params: Array) -> float:
        return 0.0

    def count(self, params: Array) -> int:
        return int(params.size)


def _mean(x: Array, mass: Array) -> Array:
    return (x @ mass) / np.maximum(mass.sum(0), 1e-300)


def _refuse(wrong: Array, x: Array, column: int, family: str, wanted: str) -> None:
    if wrong.any():
        raise ValueError(f"column {column} has the value {x[wrong][0]:g} but the {family} family wants {wanted}")


class Gaussian(Family):
    """Mean and variance."""

    def check(self, x: Array, column: int) -> None:
        pass

    def fit(self, x: Array, weight: Array, mass: Array) -> Array:
        mean = _mean(x, mass)
        variance = np.einsum("te,te->e", mass, (x[:, None] - mean) ** 2) / np.maximum(mass.sum(0), 1e-300)
        center = weight @ x / weight.sum()
        overall = weight @ (x - center) ** 2 / weight.sum()
        floor = _EDGE * (overall if overall > 1e-24 * max(1.0, center**2) else 1.0)
        return np.column_stack([mean, np.maximum(variance, floor)])

    def log_prob(self, params: Array, x: Array) -> Array:
        mean, variance = params.T
        return -0.5 * ((x[:, None] - mean) ** 2 / variance + np.log(2 * np.pi * variance))

    def free(self, params: Array) -> Array:
        return np.column_stack([params[:, 0], 0.5 * np.log(params[:, 1])])

    def restore(self, numbers: Array) -> Array:
        return np.column_stack([numbers[:, 0], np.exp(2 * numbers[:, 1])])

    def gradient(self, params: Array, x: Array, mass: Array) -> Array:
        error = x[:, None] - params[:, 0]
        by_mean = np.einsum("te,te->e", mass, error) / params[:, 1]
        return np.column_stack([by_mean, np.einsum("te,te->e", mass, error**2 / params[:, 1] - 1)])


class Bernoulli(Family):
    """Probability of a one."""

    def check(self, x: Array, column: int) -> None:
        _refuse(~np.isin(x, (0, 1)), x, column, "bernoulli", "0 or 1")

    def fit(self, x: Array, weight: Array, mass: Array) -> Array:
        return np.clip(_mean(x, mass), _EDGE, 1 - _EDGE)[:, None]

    def log_prob(self, params: Array, x: Array) -> Array:
        log_p, log_rest = np.log(params[:, 0]), np.log1p(-params[:, 0])
        return np.where(np.isin(x, (0, 1))[:, None], x[:, None] * log_p + (1 - x[:, None]) * log_rest, -np.inf)

    def free(self, params: Array) -> Array:
        return np.log(params) - np.log1p(-params)

    def restore(self, numbers: Array) -> Array:
        return np.clip(1 / (1 + np.exp(-numbers)), 1e-12, 1 - 1e-12)

    def gradient(self, params: Array, x: Array, mass: Array) -> Array:
        return (x @ mass - mass.sum(0) * params[:, 0])[:, None]


class Categorical(Family):
    """Probabilities of the values 0, 1, 2 ... under a Dirichlet(1.001) prior; unseen values get the edge."""

    prior = 1e-3

    def check(self, x: Array, column: int) -> None:
        _refuse((x < 0) | (x != np.round(x)), x, column, "categorical", "whole numbers from 0")

    def fit(self, x: Array, weight: Array, mass: Array) -> Array:
        counts = np.stack([mass[x == value].sum(0) for value in range(int(x.max()) + 1)], axis=1) + self.prior
        return counts / counts.sum(1, keepdims=True)

    def log_prob(self, params: Array, x: Array) -> Array:
        value = x.astype(np.int64)
        known = (value == x) & (value >= 0) & (value < params.shape[1])
        return np.where(known[:, None], np.log(params[:, np.where(known, value, 0)].T), np.log(_EDGE))

    def penalty(self, params: Array) -> float:
        return -self.prior * float(np.log(params).sum())

    def count(self, params: Array) -> int:
        return len(params) * (params.shape[1] - 1)

    def free(self, params: Array) -> Array:
        return np.log(params[:, :-1]) - np.log(params[:, -1:])

    def restore(self, numbers: Array) -> Array:
        logits = np.column_stack([numbers, np.zeros(len(numbers))])
        return np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))

    def gradient(self, params: Array, x: Array, mass: Array) -> Array:
        counts = np.stack([mass[x == value].sum(0) for value in range(params.shape[1])], axis=1) + self.prior
        return (counts - counts.sum(1, keepdims=True) * params)[:, :-1]


class Poisson(Family):
    """Rate of a count."""

    def check(self, x: Array, column: int) -> None:
        _refuse(x < 0, x, column, "poisson", "counts of 0 and more")

    def fit(self, x: Array, weight: Array, mass: Array) -> Array:
        floor = _EDGE * max(weight @ x / weight.sum(), _EDGE)
        return np.maximum(_mean(x, mass), floor)[:, None]

    def log_prob(self, params: Array, x: Array) -> Array:
        rate = params[:, 0]
        with np.errstate(invalid="ignore"):
            value = x[:, None] * np.log(rate) - rate - gammaln(np.maximum(x, 0) + 1)[:, None]
        return np.where(x[:, None] >= 0, value, -np.inf)

    def free(self, params: Array) -> Array:
        return np.log(params)

    def restore(self, numbers: Array) -> Array:
        return np.exp(numbers)

    def gradient(self, params: Array, x: Array, mass: Array) -> Array:
        return (x @ mass - mass.sum(0) * params[:, 0])[:, None]


class Gamma(Family):
    """Mean and shape of a positive number."""

    def check(self, x: Array, column: int) -> None:
        _refuse(x <= 0, x, column, "gamma", "numbers above 0")

    def fit(self, x: Array, weight: Array, mass: Array) -> Array:
        mean = np.maximum(_mean(x, mass), 1e-300)
        gap = np.log(mean) - _mean(np.log(x), mass)
        return np.column_stack([mean, gamma_shape(gap)])

    def log_prob(self, params: Array, x: Array) -> Array:
        mean, shape = params.T
        x = x[:, None]
        log_x = np.log(np.maximum(x, 1e-300))
        surplus = log_x - np.log(mean)
        value = shape * (surplus - np.expm1(surplus)) + gamma_peak(shape) - log_x
        return np.where(x > 0, value, -np.inf)

    def free(self, params: Array) -> Array:
        return np.log(params)

    def restore(self, numbers: Array) -> Array:
        return np.exp(numbers)

    def gradient(self, params: Array, x: Array, mass: Array) -> Array:
        mean, shape = params.T
        ratio = x[:, None] / mean
        by_mean = np.einsum("te,te->e", mass, ratio - 1) * shape
        by_shape = np.einsum("te,te->e", mass, np.log(shape) + 1 + np.log(ratio) - ratio - digamma(shape))
        return np.column_stack([by_mean, shape * by_shape])


class Exponential(Family):
    """Mean of a waiting time."""

    def check(self, x: Array, column: int) -> None:
        _refuse(x < 0, x, column, "exponential", "numbers of 0 and more")

    def fit(self, x: Array, weight: Array, mass: Array) -> Array:
        floor = _EDGE * max(weight @ x / weight.sum(), _EDGE)
        return np.maximum(_mean(x, mass), floor)[:, None]

    def log_prob(self, params: Array, x: Array) -> Array:
        mean = params[:, 0]
        return np.where(x[:, None] >= 0, -x[:, None] / mean - np.log(mean), -np.inf)

    def free(self, params: Array) -> Array:
        return np.log(params)

    def restore(self, numbers: Array) -> Array:
        return np.exp(numbers)

    def gradient(self, params: Array, x: Array, mass: Array) -> Array:
        return (x @ mass / params[:, 0] - mass.sum(0))[:, None]


FAMILIES: dict[str, Family] = {
    "gaussian": Gaussian(),
    "bernoulli": Bernoulli(),
    "categorical": Categorical(),
    "poisson": Poisson(),
    "exponential": Exponential(),
    "gamma": Gamma(),
}
