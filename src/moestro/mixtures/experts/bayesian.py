"""Bayesian linear experts, fitted by variational EM."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import ndtr

from moestro.mixtures.experts.base import Expert, keep_empty, own_rows, planes
from moestro.mixtures.gates.base import Effort, Params
from moestro.mixtures.numerics import Array, is_empty, predictions, weighted_gram
from moestro.mixtures.rows import Rows, Scaling

_STEPS = 10
_FLAT = 1e-10  # precision of the intercept's prior


class BayesianExpert(Expert):
    """Linear regressions with a posterior over their coefficients (Waterhouse, MacKay & Robinson 1996).

        β_i ~ N(0, I / α_i) (intercept flat),   y | x, i ~ N(β_iᵀ[1, x], σ_i²)

    EM climbs the variational bound `sum_t w_t log sum_i g_i(x_t) exp E[log N(y_t; β_iᵀz_t, σ_i²)] - sum_i
    KL(q(β_i) | prior)`: the posterior is closed form, and α_i and σ_i² are the maxima of the bound given it. One
    expert is `sklearn.linear_model.BayesianRidge` with flat hyperpriors on standardised inputs. Reported densities
    are those of new targets.

    Args:
        precision: fix α, on standardised inputs and targets, instead of learning one per expert.

    Parameters: `coef` `[experts, p, 1]`, `spread` (posterior covariances) `[experts, p, p]`, `noise`, `precision`
    and `divergence` `[experts]`.
    """

    parametric = False

    def __init__(self, precision: float | None = None):
        self.precision = precision

    def m_step(self, rows: Rows, mass: Array, params: Params | None, effort: Effort) -> Params:
        gram, total = weighted_gram(rows.z, mass), mass.sum(0)
        cross = rows.z.T @ (mass * rows.y)  # [p, experts]
        square = mass.T @ rows.y[:, 0] ** 2
        found = []
        for i in range(mass.shape[1]):
            start = (1.0, 1.0) if params is None else (params["precision"][i], params["noise"][i])
            if self.precision is not None:
                start = (self.precision, start[1])
            block = gram[i], cross[:, i], float(square[i]), float(total[i])
            found.append(_climb(block, start, max(rows.floor, 1e-8), self.precision is None, effort.enough))
        names = ("coef", "spread", "noise", "precision", "divergence")
        new = {name: np.array([each[k] for each in found]) for k, name in enumerate(names)}
        new["coef"] = new["coef"][:, :, None]
        return keep_empty(new, params, is_empty(total, rows.total))

    @staticmethod
    def _function_variance(params: Params, z: Array) -> Array:
        return np.stack([np.einsum("tp,tp->t", z @ spread, z) for spread in params["spread"]], axis=1)

    def expected_log_prob(self, params: Params, z: Array, y: Array) -> Array:
        noise = params["noise"]
        square = (y - predictions(z, params["coef"])[:, :, 0]) ** 2 + self._function_variance(params, z)
        return -0.5 * (square / noise + np.log(2 * np.pi * noise))

    def log_prob(self, params: Params, z: Array, y: Array) -> Array:
        total = self.variance(params, z)[:, :, 0]
        square = (y - predictions(z, params["coef"])[:, :, 0]) ** 2
        return -0.5 * (square / total + np.log(2 * np.pi * total))

    def mean(self, params: Params, z: Array) -> Array:
        return predictions(z, params["coef"])

    def variance(self, params: Params, z: Array) -> Array:
        return (self._function_variance(params, z) + params["noise"])[:, :, None]

    def cdf(self, params: Params, z: Array, y: Array) -> Array:
        return ndtr((y[:, None, :] - self.mean(params, z)) / np.sqrt(self.variance(params, z)))

    def sample(self, params: Params, z: Array, label: Array, rng: np.random.RandomState) -> Array:
        variance = self.variance(params, z)[np.arange(len(z)), label]
        return own_rows(z, params["coef"], label) + rng.standard_normal((len(z), 1)) * np.sqrt(variance)

    def penalty(self, params: Params, rows: Rows) -> float:
        return float(params["divergence"].sum())

    def count(self, params: Params) -> int:
        return int(params["coef"].size + params["noise"].size)

    def attributes(self, params: Params, scaling: Scaling) -> dict[str, Any]:
        return {
            **planes(params["coef"], scaling),
            "expert_noise_": params["noise"] * scaling.y_scale**2,
            "expert_precision_": params["precision"].copy(),
        }


Block = tuple[Array, Array, float, float]  # zᵀ diag(mass) z, zᵀ diag(mass) y, yᵀ diag(mass) y, mass


def _posterior(block: Block, precision: float, noise: float) -> tuple[Array, Array, float, float, float]:
    """Mean, covariance, expected square error, divergence from the prior, and the bound of one expert."""
    gram, cross, square, total = block
    prior = np.full(len(gram), precision)
    prior[0] = min(_FLAT, precision)
    values, vectors = np.linalg.eigh(gram / noise + np.diag(prior))
    spread = (vectors / values) @ vectors.T
    mean = spread @ cross / noise
    error = square - 2 * float(mean @ cross) + float(mean @ gram @ mean) + float((gram * spread).sum())
    inside = float(prior @ (mean**2 + np.diag(spread))) - len(prior) - float(np.log(prior).sum())
    divergence = 0.5 * (inside + float(np.log(values).sum()))
    bound = -0.5 * (total * float(np.log(2 * np.pi * noise)) + error / noise) - divergence
    return mean, spread, error, divergence, bound


def _climb(
    block: Block, start: tuple[float, float], floor: float, learn: bool, enough: float
) -> tuple[Array, Array, float, float, float]:
    """Variational steps in precision and noise, each the maximum of the bound given the posterior, until one of
    them gains less than enough."""
    precision, noise = float(start[0]), float(max(start[1], floor))
    mean, spread, error, divergence, bound = _posterior(block, precision, noise)
    for _ in range(_STEPS):
        noise = max(error / max(block[3], 1e-300), floor)
        if learn and len(mean) > 1:
            size = float((mean[1:] ** 2).sum() + np.trace(spread[1:, 1:]))
            precision = min(max((len(mean) - 1) / max(size, 1e-12), 1e-8), 1e8)
        before = bound
        mean, spread, error, divergence, bound = _posterior(block, precision, noise)
        if bound - before <= enough:
            break
    return mean, spread, noise, precision, divergence
