"""The Gaussian gate: the posterior of a Gaussian mixture on the inputs (Xu, Jordan & Hinton 1995)."""

from __future__ import annotations

from typing import Any

import numpy as np

from moestro.mixtures import covariance as shapes
from moestro.mixtures.gates.base import Effort, Gate, Params
from moestro.mixtures.numerics import Array, is_empty
from moestro.mixtures.rows import Rows, Scaling


def log_normal(error: Array, covariance: Array) -> Array:
    """Log-density of centred normal vectors. Shapes: `[rows, q]`, `[q, q]` -> `[rows]`."""
    lower = np.linalg.cholesky(covariance)
    white = np.linalg.solve(lower, error.T)
    half_volume = np.log(np.diag(lower)).sum() + 0.5 * len(lower) * np.log(2 * np.pi)
    return -0.5 * np.einsum("qt,qt->t", white, white) - half_volume


class GaussianGate(Gate):
    """Experts own Gaussian regions of the input space; every step of EM is closed form.

        g_i(x) = α_i N(x | m_i, S_i) / sum_j α_j N(x | m_j, S_j)    Xu, Jordan & Hinton 1995, eq. 7

    EM raises the joint likelihood of inputs and targets; the conditional one may fall meanwhile. Tied covariances
    make the gate a softmax that is linear in x, untied ones quadratic. For more than about 20 inputs use "diag".

    Args:
        covariance: "full", "diag", "spherical" (in standardised inputs), "rank-k", or "tied", "tied-diag",
            "tied-spherical". "rank-k" gives every expert a subspace of k dimensions and the row to the expert that
            reconstructs it best: a mixture of probabilistic principal components (Tipping & Bishop 1999).
        floor: smallest eigenvalue, in standardised units.

    Parameters: `log_weight` `[experts]`, `mean` `[experts, features]`,
    `covariance` `[experts, features, features]`.
    """

    generative = True

    def __init__(self, covariance: str = "full", floor: float = 1e-6):
        self.covariance = covariance
        self.floor = floor

    def design(self, x: Array, scaling: Scaling) -> Array:
        return scaling.x(x)

    def log_volume(self, scaling: Scaling) -> float:
        return float(np.log(scaling.x_scale).sum())

    def start(self, rows: Rows, share: Array, branching: tuple[int, ...], effort: Effort) -> Params:
        shapes.check_kind(self.covariance)
        return self.m_step(rows, share, {}, effort)

    def m_step(self, rows: Rows, share: Array, params: Params, effort: Effort) -> Params:
        weighted = rows.weight[:, None] * share
        mass = weighted.sum(0)
        mean = (weighted.T @ rows.u) / np.maximum(mass, 1e-300)[:, None]
        spread = self._scatter(rows.u, mean, weighted)
        matrices = shapes.maximise(spread, mass, self.covariance, self.floor)
        empty = is_empty(mass, rows.total)
        if params and empty.any():
            mean[empty] = params["mean"][empty]
            matrices = np.where(empty[:, None, None], params["covariance"], matrices)
        log_weight = np.log(np.maximum(mass / mass.sum(), 1e-300))
        return {"log_weight": log_weight, "mean": mean, "covariance": matrices}

    @staticmethod
    def _scatter(u: Array, mean: Array, weighted: Array) -> Array:
        out = np.empty((len(mean), u.shape[1], u.shape[1]))
        for i, center in enumerate(mean):
            error = u - center
            out[i] = (weighted[:, i, None] * error).T @ error
        return out

    def log_weight(self, params: Params, u: Array) -> Array:
        out = np.empty((len(u), len(params["mean"])))
        for i, center in enumerate(params["mean"]):
            out[:, i] = params["log_weight"][i] + log_normal(u - center, params["covariance"][i])
        return out

    def count(self, params: Params) -> int:
        num, width = params["mean"].shape
        return num - 1 + num * width + shapes.count(self.covariance, num, width)

    def attributes(self, params: Params, scaling: Scaling) -> dict[str, Any]:
        stretch = np.outer(scaling.x_scale, scaling.x_scale)
        return {
            "gate_means_": scaling.x_center + params["mean"] * scaling.x_scale,
            "gate_covariances_": params["covariance"] * stretch,
        }

    def free(self, params: Params) -> Array:
        logits = params["log_weight"][:-1] - params["log_weight"][-1]
        return np.concatenate([logits, params["mean"].ravel(), shapes.free(params["covariance"], self.covariance)])

    def restore(self, numbers: Array, like: Params) -> Params:
        num, width = like["mean"].shape
        logits, mean, rest = np.split(numbers, [num - 1, num - 1 + num * width])
        logits = np.append(logits, 0.0)
        return {
            "log_weight": logits - np.logaddexp.reduce(logits),
            "mean": mean.reshape(num, width),
            "covariance": shapes.restore(rest, like["covariance"], self.covariance),
        }

    def gradient(self, rows: Rows, share: Array, params: Params) -> Array:
        weighted = rows.weight[:, None] * share
        mass = weighted.sum(0)
        by_weight = (mass - rows.total * np.exp(params["log_weight"]))[:-1]
        pull = weighted.T @ rows.u - mass[:, None] * params["mean"]
        by_mean = np.linalg.solve(params["covariance"], pull[:, :, None])[:, :, 0]
        spread = self._scatter(rows.u, params["mean"], weighted)
        by_shape = shapes.gradient(spread, mass, params["covariance"], self.covariance)
        return np.concatenate([by_weight, by_mean.ravel(), by_shape])

    def permute(self, params: Params, order: Array) -> Params:
        return {name: value[order] for name, value in params.items()}
