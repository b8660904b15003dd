"""Linear-Gaussian experts: linear, ridge, full covariance, constant."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import ndtr

from moestro.mixtures import covariance as shapes
from moestro.mixtures.experts.base import Expert, keep_empty, own_rows, planes, ridge
from moestro.mixtures.gates.base import Effort, Params
from moestro.mixtures.gates.gaussian import log_normal
from moestro.mixtures.numerics import Array, is_empty, least_squares, predictions, scatter
from moestro.mixtures.rows import Rows, Scaling


class GaussianExpert(Expert):
    """Linear regressions with normal errors: `f_i(y|x) = N(y; B_iᵀ[1, x], S_i)` (Jordan & Jacobs 1994).

    `S_i = (sum_t s_t h_ti e_ti e_tiᵀ + α B_iᵀB_i) / H_i`: maximum likelihood (division by the mass), or the mode
    under a normal prior on the slopes with variance `S_i / α`, which makes one expert equal to ridge regression.

    Args:
        covariance: shape of S: "full", "diag", "spherical", or "tied", "tied-diag", "tied-spherical" for one
            matrix shared by all experts.
        alpha: ridge on the slopes in the units of the data, as in `sklearn.linear_model.Ridge`.
        fixed_variance: fix all variances at this number (in squared units of y) instead of learning them.

    Parameters: `coef` `[experts, p, outputs]`, `covariance` `[experts, outputs, outputs]`.
    """

    multi_output = True

    def __init__(self, covariance: str = "full", alpha: float = 0.0, fixed_variance: float | None = None):
        self.covariance = covariance
        self.alpha = alpha
        self.fixed_variance = fixed_variance

    def m_step(self, rows: Rows, mass: Array, params: Params | None, effort: Effort) -> Params:
        penalty = ridge(rows, self.alpha)
        coef = least_squares(rows.z, rows.y, mass, penalty)
        total = mass.sum(0)
        empty = is_empty(total, rows.total)
        if params is not None and empty.any():
            coef = np.where(empty[:, None, None], params["coef"], coef)
        if self.fixed_variance is not None:
            fixed = self.fixed_variance / rows.scaling.y_scale**2
            covariance = np.tile(fixed * np.eye(rows.y.shape[1]), (len(coef), 1, 1))
            return {"coef": coef, "covariance": covariance}
        shapes.check_kind(self.covariance)
        spread = self._spread(rows, mass, coef, penalty)
        covariance = shapes.maximise(spread, total, self.covariance, rows.floor)
        if self.covariance.startswith("tied"):
            return {"coef": coef, "covariance": covariance}
        return keep_empty({"coef": coef, "covariance": covariance}, params, empty)

    @staticmethod
    def _spread(rows: Rows, mass: Array, coef: Array, penalty: Array) -> Array:
        spread = scatter(rows.y[:, None, :] - predictions(rows.z, coef), mass)
        return spread + coef.transpose(0, 2, 1) @ (penalty[:, None] * coef) if penalty.any() else spread

    def log_prob(self, params: Params, z: Array, y: Array) -> Array:
        error = predictions(z, params["coef"])
        np.subtract(y[:, None, :], error, out=error)
        covariance = params["covariance"]
        if y.shape[1] == 1:
            variance = covariance[:, 0, 0]
            out = error[:, :, 0]
            np.square(out, out=out)
            out *= -0.5 / variance
            out -= 0.5 * np.log(2 * np.pi * variance)
            return out
        return np.stack([log_normal(error[:, i], covariance[i]) for i in range(len(covariance))], axis=1)

    def mean(self, params: Params, z: Array) -> Array:
        return predictions(z, params["coef"])

    def variance(self, params: Params, z: Array) -> Array:
        each = np.einsum("eqq->eq", params["covariance"])
        return np.broadcast_to(each, (len(z), *each.shape))

    def cdf(self, params: Params, z: Array, y: Array) -> Array:
        return ndtr((y[:, None, :] - self.mean(params, z)) / np.sqrt(self.variance(params, z)))

    def sample(self, params: Params, z: Array, label: Array, rng: np.random.RandomState) -> Array:
        lower = np.linalg.cholesky(params["covariance"])[label]
        noise = rng.standard_normal((len(z), lower.shape[1]))
        return own_rows(z, params["coef"], label) + np.einsum("tab,tb->ta", lower, noise)

    def penalty(self, params: Params, rows: Rows) -> float:
        weights = ridge(rows, self.alpha)
        if not weights.any():
            return 0.0
        coef = params["coef"]
        prior = coef.transpose(0, 2, 1) @ (weights[:, None] * coef)
        return 0.5 * float(np.trace(np.linalg.solve(params["covariance"], prior), axis1=1, axis2=2).sum())

    def count(self, params: Params) -> int:
        num, _, q = params["coef"].shape
        spread = 0 if self.fixed_variance is not None else shapes.count(self.covariance, num, q)
        return params["coef"].size + spread

    def attributes(self, params: Params, scaling: Scaling) -> dict[str, Any]:
        covariance = params["covariance"] * scaling.y_scale**2
        return {
            **planes(params["coef"], scaling),
            "expert_covariance_": covariance,
            "expert_variance_": np.einsum("eqq->eq", covariance).copy(),
        }

    def free(self, params: Params) -> Array:
        if self.fixed_variance is not None:
            return params["coef"].ravel()
        return np.concatenate([params["coef"].ravel(), shapes.free(params["covariance"], self.covariance)])

    def restore(self, numbers: Array, like: Params) -> Params:
        coef, rest = np.split(numbers, [like["coef"].size])
        covariance = like["covariance"]
        if self.fixed_variance is None:
            covariance = shapes.restore(rest, covariance, self.covariance)
        return {"coef": coef.reshape(like["coef"].shape), "covariance": covariance}

    def gradient(self, rows: Rows, mass: Array, params: Params) -> Array:
        penalty, coef, covariance = ridge(rows, self.alpha), params["coef"], params["covariance"]
        error = rows.y[:, None, :] - predictions(rows.z, coef)
        pull = np.stack([rows.z.T @ (mass[:, i, None] * error[:, i]) for i in range(len(coef))])
        pull -= penalty[:, None] * coef
        slope = np.linalg.solve(covariance, pull.transpose(0, 2, 1)).transpose(0, 2, 1).ravel()
        if self.fixed_variance is not None:
            return slope
        spread = self._spread(rows, mass, coef, penalty)
        return np.concatenate([slope, shapes.gradient(spread, mass.sum(0), covariance, self.covariance)])


class ConstantExpert(GaussianExpert):
    """Experts that ignore the inputs: `f_i(y|x) = N(y; m_i, S_i)` (Nowlan & Hinton 1990).

    With a constant gate this is a Gaussian mixture of the targets.

    Args:
        covariance: as for `GaussianExpert`.
        fixed_variance: as for `GaussianExpert`.
    """

    def __init__(self, covariance: str = "full", fixed_variance: float | None = None):
        super().__init__(covariance=covariance, fixed_variance=fixed_variance)

    def design(self, x: Array) -> Array:
        return np.ones((len(x), 1))

    def attributes(self, params: Params, scaling: Scaling) -> dict[str, Any]:
        found = super().attributes(params, scaling)
        return {**found, "expert_mean_": found["expert_intercept_"]}
