"""Student-t experts: robust regression with learned degrees of freedom (Chamroukhi 2016)."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import betaln, digamma, gammaln, stdtr

from moestro.mixtures import covariance as shapes
from moestro.mixtures.experts.base import Expert, keep_empty, own_rows, planes
from moestro.mixtures.gates.base import Effort, Params
from moestro.mixtures.numerics import Array, is_empty, least_squares, predictions, scatter
from moestro.mixtures.rows import Rows, Scaling

_FEWEST, _MOST = 0.1, 200.0


def log_t_constant(dof: Array, q: int) -> Array:
    """`log Γ((ν+q)/2) - log Γ(ν/2) - (q/2) log νπ`, accurate for huge ν too."""
    return gammaln(q / 2) - betaln(dof / 2, q / 2) - 0.5 * q * np.log(dof * np.pi)


class StudentExpert(Expert):
    """Linear experts with (multivariate) Student errors `t(y; B_iᵀ[1, x], S_i, ν_i)`.

        w_ti = (ν_i + q) / (ν_i + e' S_i⁻¹ e),  S_i = sum_t h_ti w_ti e eᵀ / H_i    Chamroukhi 2016

    ν_i on [0.1, 200] maximises the likelihood given the rest, or where that fails solves the equation of the paper,
    which EM creeps along (ECME, ECM). `predict` uses the centre of the distribution.

    Args:
        dof: fix ν at this number for all experts; None learns one per expert.

    Parameters: `coef` `[experts, p, outputs]`, `covariance` (the scale matrix) `[experts, outputs, outputs]`,
    `dof` `[experts]`.
    """

    multi_output = True

    def __init__(self, dof: float | None = None):
        self.dof = dof

    def m_step(self, rows: Rows, mass: Array, params: Params | None, effort: Effort) -> Params:
        total, q = mass.sum(0), rows.y.shape[1]
        none = np.zeros(rows.z.shape[1])
        if params is None:
            coef = least_squares(rows.z, rows.y, mass, none)
            spread = scatter(rows.y[:, None, :] - predictions(rows.z, coef), mass)
            covariance = shapes.maximise(spread, total, "full", rows.floor)
            return {"coef": coef, "covariance": covariance, "dof": np.full(len(coef), float(self.dof or 10.0))}
        pull = self._pull(params, rows.z, rows.y)
        coef = least_squares(rows.z, rows.y, mass * pull, none)
        spread = scatter(rows.y[:, None, :] - predictions(rows.z, coef), mass * pull)
        covariance = shapes.maximise(spread, total, "full", rows.floor)
        moved = {"coef": coef, "covariance": covariance, "dof": params["dof"]}
        if self.dof is None:
            gap = np.einsum("te,te->e", mass, np.log(pull) - pull) / np.maximum(total, 1e-300)
            root = _solve_dof(gap, params["dof"], q)
            moved["dof"] = _best_dof(self._distance(moved, rows.z, rows.y), mass, params["dof"], root, q)
        return keep_empty(moved, params, is_empty(total, rows.total))

    @staticmethod
    def _distance(params: Params, z: Array, y: Array) -> Array:
        error = y[:, None, :] - predictions(z, params["coef"])
        inverse = np.linalg.inv(params["covariance"])
        if y.shape[1] == 1:
            return error[:, :, 0] ** 2 * inverse[:, 0, 0]
        return np.einsum("tea,eab,teb->te", error, inverse, error)

    def _pull(self, params: Params, z: Array, y: Array) -> Array:
        return (params["dof"] + y.shape[1]) / (params["dof"] + self._distance(params, z, y))

    def log_prob(self, params: Params, z: Array, y: Array) -> Array:
        dof, q = params["dof"], y.shape[1]
        half_volume = 0.5 * np.linalg.slogdet(params["covariance"])[1]
        tail = np.log1p(self._distance(params, z, y) / dof)
        return log_t_constant(dof, q) - half_volume - 0.5 * (dof + q) * tail

    def mean(self, params: Params, z: Array) -> Array:
        return predictions(z, params["coef"])

    def variance(self, params: Params, z: Array) -> Array:
        dof = params["dof"][:, None]
        with np.errstate(divide="ignore"):
            stretch = np.where(dof > 2, dof / np.maximum(dof - 2, 0), np.inf)
        each = np.einsum("eqq->eq", params["covariance"]) * stretch
        return np.broadcast_to(each, (len(z), *each.shape))

    def cdf(self, params: Params, z: Array, y: Array) -> Array:
        scale = np.sqrt(np.einsum("eqq->eq", params["covariance"]))
        return stdtr(params["dof"][:, None], (y[:, None, :] - self.mean(params, z)) / scale)

    def sample(self, params: Params, z: Array, label: Array, rng: np.random.RandomState) -> Array:
        lower = np.linalg.cholesky(params["covariance"])[label]
        noise = rng.standard_normal((len(z), lower.shape[1]))
        dof = params["dof"][label]
        noise /= np.sqrt(rng.chisquare(dof) / dof)[:, None]
        return own_rows(z, params["coef"], label) + np.einsum("tab,tb->ta", lower, noise)

    def count(self, params: Params) -> int:
        num, _, q = params["coef"].shape
        return params["coef"].size + shapes.count("full", num, q) + (num if self.dof is None else 0)

    def attributes(self, params: Params, scaling: Scaling) -> dict[str, Any]:
        covariance = params["covariance"] * scaling.y_scale**2
        return {
            **planes(params["coef"], scaling),
            "expert_scale_": np.sqrt(np.einsum("eqq->eq", covariance)),
            "expert_scale_matrix_": covariance,
            "expert_dof_": params["dof"].copy(),
        }

    def free(self, params: Params) -> Array:
        parts = [params["coef"].ravel(), shapes.free(params["covariance"], "full")]
        return np.concatenate([*parts, np.log(params["dof"])] if self.dof is None else parts)

    def restore(self, numbers: Array, like: Params) -> Params:
        num, _, q = like["coef"].shape
        at = np.cumsum([like["coef"].size, shapes.count("full", num, q)])
        coef, spread, dof = np.split(numbers, at)
        return {
            "coef": coef.reshape(like["coef"].shape),
            "covariance": shapes.restore(spread, like["covariance"], "full"),
            "dof": np.exp(dof) if self.dof is None else like["dof"],
        }

    def gradient(self, rows: Rows, mass: Array, params: Params) -> Array:
        pull = mass * self._pull(params, rows.z, rows.y)
        error = rows.y[:, None, :] - predictions(rows.z, params["coef"])
        by_coef = np.stack([rows.z.T @ (pull[:, i, None] * error[:, i]) for i in range(pull.shape[1])])
        by_coef = np.linalg.solve(params["covariance"], by_coef.transpose(0, 2, 1)).transpose(0, 2, 1).ravel()
        by_shape = shapes.gradient(scatter(error, pull), mass.sum(0), params["covariance"], "full")
        if self.dof is not None:
            return np.concatenate([by_coef, by_shape])
        by_dof = _dof_slope(self._distance(params, rows.z, rows.y), mass, params["dof"], rows.y.shape[1])
        return np.concatenate([by_coef, by_shape, by_dof])


def _solve_dof(gap: Array, old: Array, q: int) -> Array:
    """Bisects the decreasing stationarity equation of ν on a log scale, for all experts at once."""
    known = 1.0 + gap + digamma((old + q) / 2) - np.log((old + q) / 2)
    low, high = np.full(len(old), np.log(_FEWEST)), np.full(len(old), np.log(_MOST))
    for _ in range(32):
        middle = 0.5 * (low + high)
        half = 0.5 * np.exp(middle)
        rising = np.log(half) - digamma(half) + known > 0
        low, high = np.where(rising, middle, low), np.where(rising, high, middle)
    return np.exp(0.5 * (low + high))


def _dof_slope(distance: Array, mass: Array, dof: Array, q: int) -> Array:
    """Derivative of `sum_t mass log t` in log ν, `[experts]`; distance are squared Mahalanobis distances."""
    constant = digamma((dof + q) / 2) - digamma(dof / 2) - q / dof
    row = (dof + q) / dof * distance / (dof + distance) - np.log1p(distance / dof)
    return 0.5 * dof * (mass.sum(0) * constant + np.einsum("te,te->e", mass, row))


def _dof_value(distance: Array, mass: Array, dof: Array, q: int) -> Array:
    tail = np.einsum("te,te->e", mass, np.log1p(distance / dof))
    return mass.sum(0) * log_t_constant(dof, q) - 0.5 * (dof + q) * tail


def _best_dof(distance: Array, mass: Array, old: Array, root: Array, q: int) -> Array:
    """The best of the old ν, the ECM root, and a root of the likelihood's slope within a factor 4 of the old."""
    low, high = np.maximum(old / 4, _FEWEST), np.minimum(old * 4, _MOST)
    for _ in range(16):
        middle = np.sqrt(low * high)
        rising = _dof_slope(distance, mass, middle, q) > 0
        low, high = np.where(rising, middle, low), np.where(rising, high, middle)
    tried = np.stack([old, root, np.sqrt(low * high)])
    value = np.stack([_dof_value(distance, mass, dof, q) for dof in tried])
    return tried[value.argmax(0), np.arange(len(old))]
