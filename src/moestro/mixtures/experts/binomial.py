"""Binomial experts: how many of so many trials succeed (the GLIM family of Jordan & Jacobs 1994)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.special import bdtr, expit, gammaln

from moestro.mixtures.experts.glm import LinkedExpert, fixed_column, without_column
from moestro.mixtures.gates.base import Effort, Params
from moestro.mixtures.numerics import Array
from moestro.mixtures.rows import Rows, Scaling


class BinomialExpert(LinkedExpert):
    """Counts of successes: `log f_i(y|x) = y η - n log(1 + exp(η)) + log C(n, y)`, `η = β_iᵀ[1, x]`, n trials.

    n trials of one row are the same as n rows of one trial, so an M-step is a weighted logistic regression of the
    success rates. Where a region is separable the best slopes are infinite, and a ridge keeps them finite; it does
    not change with the iterations.

    Args:
        trials: number of the column of X that says how many trials each row had, whole numbers above 0. Neither
            gate nor experts learn from that column, and `predict` answers for the trials that it is given.
        alpha: ridge on the standardised slopes, per unit of sample weight.

    Raises:
        ValueError: trials that are no column of X or no whole numbers above 0, or a target above them.
    """

    target = "count"

    def __init__(self, trials: int, alpha: float = 1e-5):
        self.trials = trials
        self.alpha = alpha

    def covariates(self, x: Array) -> Array:
        return without_column(x, self.trials, "trials")

    def regressors(self, x: Array, scaling: Scaling) -> Array:
        trials = fixed_column(x, self.trials, "number of trials")
        wrong = trials[trials != np.round(trials)]
        if len(wrong):
            raise ValueError(
                f"column {self.trials} of X is a number of trials and has the value {wrong[0]:g}; pass whole "
                "numbers"
            )
        return np.hstack([super().regressors(x, scaling), trials])

    def _split(self, z: Array) -> tuple[Array, Array | float]:
        return z[:, :-1], 0.0

    def _penalty(self, rows: Rows) -> Array:
        ridge = np.full(1 + len(rows.scaling.x_scale), self.alpha * rows.total)
        ridge[0] = 0.0
        return ridge

    def _kernel(self, eta: Array, y: Array) -> Array:
        return y * eta - np.logaddexp(0.0, eta)

    def _working_weight(self, eta: Array) -> Array:
        rate = expit(eta)
        return rate * (1 - rate)

    def _working_slope(self, eta: Array, y: Array) -> Array:
        return y - expit(eta)

    def _link(self, average: Array) -> Array:
        rate = np.minimum(average / 1.1, 1 - 1e-8)
        return np.log(rate) - np.log1p(-rate)

    @staticmethod
    def _as_rates(rows: Rows, mass: Array) -> tuple[Rows, Array]:
        """Success rates for targets, each as often as it was tried."""
        trials = rows.z[:, -1:]
        return replace(rows, y=rows.y / trials), mass * trials

    def m_step(self, rows: Rows, mass: Array, params: Params | None, effort: Effort) -> Params:
        above = rows.y > rows.z[:, -1:]
        if params is None and above.any():
            row = np.flatnonzero(above)[0]
            raise ValueError(
                f"y has the value {rows.y[row, 0]:g} where X has {rows.z[row, -1]:g} trials; pass y <= trials"
            )
        return super().m_step(*self._as_rates(rows, mass), params, effort)

    def log_prob(self, params: Params, z: Array, y: Array) -> Array:
        trials = z[:, -1:]
        choices = gammaln(trials + 1) - gammaln(y + 1) - gammaln(np.maximum(trials - y, 0) + 1)
        inside = trials * self._kernel(self._eta(params["coef"], z), y / trials) + choices
        return np.where(y > trials, -np.inf, inside)

    def mean(self, params: Params, z: Array) -> Array:
        return (z[:, -1:] * self._rate(params, z))[:, :, None]

    def _rate(self, params: Params, z: Array) -> Array:
        return expit(self._eta(params["coef"], z))

    def variance(self, params: Params, z: Array) -> Array:
        rate = self._rate(params, z)
        return (z[:, -1:] * rate * (1 - rate))[:, :, None]

    def cdf(self, params: Params, z: Array, y: Array) -> Array:
        trials = z[:, -1].astype(np.int64)[:, None, None]
        rate = np.broadcast_to(self._rate(params, z)[:, :, None], (len(z), len(params["coef"]), y.shape[1]))
        below = bdtr(np.clip(np.floor(y)[:, None, :], 0, trials), trials, rate)
        return np.where(y[:, None, :] < 0, 0.0, below)

    def sample(self, params: Params, z: Array, label: Array, rng: np.random.RandomState) -> Array:
        rate = self._rate(params, z)[np.arange(len(z)), label]
        return rng.binomial(z[:, -1].astype(np.int64), rate).astype(float)[:, None]

    def gradient(self, rows: Rows, mass: Array, params: Params) -> Array:
        return self._coef_gradient(*self._as_rates(rows, mass), params, 1.0)
