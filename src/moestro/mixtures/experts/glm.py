"""Generalised linear experts, and the log-linear ones for counts and for positive targets (the GLIM
family of Jordan & Jacobs 1994)."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
from scipy.special import digamma, gammainc, gammaln, pdtr

from moestro.mixtures.experts.base import Expert, keep_empty, planes, ridge
from moestro.mixtures.gates.base import Effort, Params
from moestro.mixtures.numerics import Array, gamma_peak, gamma_shape, is_empty, least_squares
from moestro.mixtures.rows import Rows, Scaling

_SAME = 1e-14  # relative change of the objective that is rounding


class LinkedExpert(Expert):
    """Densities of a linear predictor `η_i(x) = β_iᵀ[1, x]` by iteratively reweighted least squares with halving.

    Parameters: `coef` `[experts, p, 1]`, and what a family adds.
    """

    alpha: float
    reach = 30.0  # |η| beyond which the density is flat

    @abstractmethod
    def _link(self, average: Array) -> Array:
        """The linear predictor of a mean that was drawn a little, by a tenth at most, upwards."""

    @abstractmethod
    def _kernel(self, eta: Array, y: Array) -> Array:
        """The part of the log-density that depends on the mean, up to a positive factor, `[rows, experts]`."""

    @abstractmethod
    def _working_weight(self, eta: Array) -> Array:
        """Expected curvature of the kernel in eta."""

    @abstractmethod
    def _working_slope(self, eta: Array, y: Array) -> Array:
        """Derivative of the kernel in eta."""

    def _split(self, z: Array) -> tuple[Array, Array | float]:
        """Regressors `[rows, p]` and what is added to every linear predictor, `[rows, 1]`."""
        return z, 0.0

    def _free_eta(self, coef: Array, z: Array) -> Array:
        regressors, offset = self._split(z)
        return regressors @ coef[:, :, 0].T + offset

    def _eta(self, coef: Array, z: Array) -> Array:
        return np.clip(self._free_eta(coef, z), -self.reach, self.reach)

    def _penalty(self, rows: Rows) -> Array:
        return ridge(rows, self.alpha * rows.total)

    def m_step(self, rows: Rows, mass: Array, params: Params | None, effort: Effort) -> Params:
        total, y = mass.sum(0), rows.y
        regressors, offset = self._split(rows.z)
        coef = self._first(rows, mass) if params is None else params["coef"]
        penalty = self._penalty(rows)
        value, eta = self._objective(coef, rows, mass, penalty)
        for _ in range(effort.steps):
            weight = np.maximum(self._working_weight(eta), 1e-10)
            response = self._free_eta(coef, rows.z) - offset + self._working_slope(eta, y) / weight
            wanted = least_squares(regressors, response[:, :, None], mass * weight, penalty)
            before = value
            coef, value, eta = self._halve(coef, value, eta, wanted - coef, rows, mass, penalty)
            if (value - before).max() <= max(effort.enough, _SAME * (1 + np.abs(value).max())):
                break
        return keep_empty(self._finish(rows, mass, coef, eta, params), params, is_empty(total, rows.total))

    def _first(self, rows: Rows, mass: Array) -> Array:
        """Constant means: the average of each expert's rows, drawn a little to that of all."""
        regressors, offset = self._split(rows.z)
        exposure = np.broadcast_to(np.exp(offset), rows.y.shape)[:, 0]
        average = mass.T @ rows.y[:, 0] / np.maximum(mass.T @ exposure, 1e-300)
        overall = (rows.weight @ rows.y[:, 0]) / (rows.weight @ exposure)
        coef = np.zeros((mass.shape[1], regressors.shape[1], 1))
        coef[:, 0, 0] = self._link(average + 0.1 * overall + 1e-8)
        return coef

    def _halve(
        self, coef: Array, value: Array, eta: Array, step: Array, rows: Rows, mass: Array, penalty: Array
    ) -> tuple[Array, Array, Array]:
        waiting = np.ones(len(coef), dtype=bool)
        for halving in range(31):
            tried = coef + step * 0.5**halving
            tried_value, tried_eta = self._objective(tried, rows, mass, penalty)
            take = waiting & (tried_value >= value)
            coef = np.where(take[:, None, None], tried, coef)
            eta, value = np.where(take, tried_eta, eta), np.where(take, tried_value, value)
            waiting &= ~take
            if not waiting.any():
                break
        return coef, value, eta

    def _objective(self, coef: Array, rows: Rows, mass: Array, penalty: Array) -> tuple[Array, Array]:
        eta = self._eta(coef, rows.z)
        value = np.einsum("te,te->e", mass, self._kernel(eta, rows.y))
        return value - 0.5 * (penalty[:, None] * coef**2).sum((1, 2)), eta

    def _finish(self, rows: Rows, mass: Array, coef: Array, eta: Array, params: Params | None) -> Params:
        return {"coef": coef}

    def penalty(self, params: Params, rows: Rows) -> float:
        return 0.5 * float((self._penalty(rows)[:, None] * params["coef"] ** 2).sum())

    def count(self, params: Params) -> int:
        return sum(int(value.size) for value in params.values())

    def attributes(self, params: Params, scaling: Scaling) -> dict[str, Any]:
        return planes(params["coef"], scaling)

    def free(self, params: Params) -> Array:
        return params["coef"].ravel()

    def restore(self, numbers: Array, like: Params) -> Params:
        return {"coef": numbers.reshape(like["coef"].shape)}

    def _coef_gradient(self, rows: Rows, mass: Array, params: Params, factor: Array | float) -> Array:
        slope = factor * mass * self._working_slope(self._eta(params["coef"], rows.z), rows.y)
        slope = slope * (np.abs(self._free_eta(params["coef"], rows.z)) < self.reach)
        return (
            (slope.T @ self._split(rows.z)[0])[:, :, None] - self._penalty(rows)[:, None] * params["coef"]
        ).ravel()

    def gradient(self, rows: Rows, mass: Array, params: Params) -> Array:
        return self._coef_gradient(rows, mass, params, 1.0)


class LogLinearExpert(LinkedExpert):
    """Means `μ_i(x) = exp(η_i(x))`."""

    def _link(self, average: Array) -> Array:
        return np.log(average)

    def mean(self, params: Params, z: Array) -> Array:
        return np.exp(self._eta(params["coef"], z))[:, :, None]


def without_column(x: Array, column: int, name: str) -> Array:
    """The other columns of X, where one has a meaning of its own."""
    if not 0 <= column < x.shape[1]:
        raise ValueError(f"{name}={column} is no column of X; pass one of 0 to {x.shape[1] - 1}")
    if x.shape[1] == 1:
        raise ValueError(f"X has only the column of the {name}; add one with inputs, or a constant one")
    return np.delete(x, column, axis=1)


def fixed_column(x: Array, column: int, name: str) -> Array:
    """That column `[rows, 1]`, above 0."""
    values = x[:, [column]]
    if values.min() <= 0:
        raise ValueError(
            f"column {column} of X is a {name} and has the value {values.min():g}; pass numbers above 0"
        )
    return values


class PoissonExpert(LogLinearExpert):
    """Counts: `log f_i(y|x) = y η - exp(η) - log y!`, `η = β_iᵀ[1, x] + log exposure`.

    Args:
        alpha: ridge on the slopes in the units of the data, per unit of sample weight, as in
            `sklearn.linear_model.PoissonRegressor`.
        exposure: number of the column of X that says for how long, or over how many, each row counted; None where
            all rows counted alike. Neither gate nor experts learn from that column: it multiplies the means, the
            coefficients leave it out, and `predict` answers for the exposures that it is given.

    Raises:
        ValueError: an exposure that is no column of X or not above 0.
    """

    target = "count"
    deviance = 1

    def __init__(self, alpha: float = 0.0, exposure: int | None = None):
        self.alpha = alpha
        self.exposure = exposure

    def covariates(self, x: Array) -> Array:
        return x if self.exposure is None else without_column(x, self.exposure, "exposure")

    def regressors(self, x: Array, scaling: Scaling) -> Array:
        z = super().regressors(x, scaling)
        if self.exposure is None:
            return z
        return np.hstack([z, np.log(fixed_column(x, self.exposure, "measure of exposure"))])

    def _split(self, z: Array) -> tuple[Array, Array | float]:
        return (z, 0.0) if self.exposure is None else (z[:, :-1], z[:, -1:])

    def _kernel(self, eta: Array, y: Array) -> Array:
        return y * eta - np.exp(eta)

    def _working_weight(self, eta: Array) -> Array:
        return np.exp(eta)

    def _working_slope(self, eta: Array, y: Array) -> Array:
        return y - np.exp(eta)

    def log_prob(self, params: Params, z: Array, y: Array) -> Array:
        return self._kernel(self._eta(params["coef"], z), y) - gammaln(y + 1)

    def variance(self, params: Params, z: Array) -> Array:
        return self.mean(params, z)

    def cdf(self, params: Params, z: Array, y: Array) -> Array:
        below = pdtr(np.maximum(np.floor(y), 0)[:, None, :], self.mean(params, z))
        return np.where(y[:, None, :] < 0, 0.0, below)

    def sample(self, params: Params, z: Array, label: Array, rng: np.random.RandomState) -> Array:
        return rng.poisson(self.mean(params, z)[np.arange(len(z)), label]).astype(float)


class GammaExpert(LogLinearExpert):
    """Positive targets: gamma densities with mean `μ = exp(β_iᵀ[1, x])` and a shape a_i.

        log f = a log a - a log μ + (a - 1) log y - a y / μ - log Γ(a)

    The mean does not depend on the shape; the shape solves `log a - ψ(a) = mean(y/μ - log(y/μ) - 1)`.

    Args:
        alpha: ridge on the slopes, as in `sklearn.linear_model.GammaRegressor`, scaled by the shape.

    Parameters: `coef`, `shape` `[experts]`.
    """

    target = "positive"
    deviance = 2
    reach = 200.0

    def __init__(self, alpha: float = 0.0):
        self.alpha = alpha

    def _kernel(self, eta: Array, y: Array) -> Array:
        """`log(y/μ) - y/μ + 1`: next to 0 where the shape is large, so that its product keeps its digits."""
        surplus = np.log(y) - eta
        return surplus - np.expm1(surplus)

    def _working_weight(self, eta: Array) -> Array:
        return np.ones_like(eta)

    def _working_slope(self, eta: Array, y: Array) -> Array:
        return y * np.exp(-eta) - 1

    def _finish(self, rows: Rows, mass: Array, coef: Array, eta: Array, params: Params | None) -> Params:
        loss = 0.5 * (self._penalty(rows)[:, None] * coef**2).sum((1, 2))
        loss -= np.einsum("te,te->e", mass, self._kernel(eta, rows.y))
        return {"coef": coef, "shape": gamma_shape(loss / np.maximum(mass.sum(0), 1e-300))}

    def log_prob(self, params: Params, z: Array, y: Array) -> Array:
        a, eta = params["shape"], self._eta(params["coef"], z)
        return a * self._kernel(eta, y) + gamma_peak(a) - np.log(y)

    def penalty(self, params: Params, rows: Rows) -> float:
        prior = (self._penalty(rows)[:, None] * params["coef"] ** 2).sum((1, 2))
        return 0.5 * float(params["shape"] @ prior)

    def variance(self, params: Params, z: Array) -> Array:
        return self.mean(params, z) ** 2 / params["shape"][:, None]

    def cdf(self, params: Params, z: Array, y: Array) -> Array:
        shape = params["shape"][:, None]
        return gammainc(shape, shape * np.maximum(y, 0)[:, None, :] / self.mean(params, z))

    def sample(self, params: Params, z: Array, label: Array, rng: np.random.RandomState) -> Array:
        shape = params["shape"][label]
        mean = self.mean(params, z)[np.arange(len(z)), label]
        return rng.gamma(shape[:, None], mean / shape[:, None])

    def attributes(self, params: Params, scaling: Scaling) -> dict[str, Any]:
        return {**super().attributes(params, scaling), "expert_shape_": params["shape"].copy()}

    def free(self, params: Params) -> Array:
        return np.concatenate([params["coef"].ravel(), np.log(params["shape"])])

    def restore(self, numbers: Array, like: Params) -> Params:
        coef, shape = np.split(numbers, [like["coef"].size])
        return {"coef": coef.reshape(like["coef"].shape), "shape": np.exp(shape)}

    def gradient(self, rows: Rows, mass: Array, params: Params) -> Array:
        a, eta = params["shape"], self._eta(params["coef"], rows.z)
        slope = (mass * self._working_slope(eta, rows.y)).T @ rows.z
        by_coef = a[:, None, None] * (slope[:, :, None] - self._penalty(rows)[:, None] * params["coef"])
        inner = np.log(a) - digamma(a) + self._kernel(eta, rows.y)
        prior = 0.5 * (self._penalty(rows)[:, None] * params["coef"] ** 2).sum((1, 2))
        by_shape = a * (np.einsum("te,te->e", mass, inner) - prior)
        return np.concatenate([by_coef.ravel(), by_shape])
