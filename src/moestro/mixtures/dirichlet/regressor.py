"""The infinite mixture of Gaussian process experts, sampled (Rasmussen & Ghahramani 2001)."""

from __future__ import annotations

from functools import partial
from typing import Any, Self

import numpy as np
from scipy.special import ndtr
from sklearn.base import RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from moestro.mixtures.dirichlet.base import DirichletProcess
from moestro.mixtures.dirichlet.gp_chain import GPChain, Settings, draw_prior, occupation, predictive
from moestro.mixtures.numerics import Array, draw_labels, softmax_rows, weighted_moments

_PRIOR_DRAWS = 20  # of an empty expert's variance, at prediction
_HALVINGS = 60  # halvings of a quantile's bracket


class DirichletProcessMixtureOfExpertsRegressor(RegressorMixin, DirichletProcess):
    """Gaussian process experts whose number is inferred, under a Dirichlet process that sees the inputs.

        P(c_t = j | rest) = n_tj / (n - 1 + α)
        n_tj = (n - 1) sum_s K(x_t, x_s) [c_s = j] / sum_s K(x_t, x_s), s ≠ t
        y_j ~ N(0, v0 exp(-½ sum_k (x_k - x'_k)² / w_k²) + v1 I)         Rasmussen & Ghahramani 2001, eqs. 3-5

    Labels by Gibbs sampling with auxiliary experts (Neal 2000, algorithm 8); the hyperparameters of every expert
    and α by slice sampling; the widths φ of K by Metropolis steps on the pseudo-likelihood of the labels. Inputs
    and targets are standardised. Departures: logs of v0, v1 and w have normal priors (means 0, log 0.1, 0;
    deviation 1) and are slice-sampled where the paper runs hybrid Monte Carlo. Predictions average the kept draws
    and use no random numbers. The cost of a sweep is about `sum_j rows_j³`; 200 rows take seconds, 2000 rows
    hours.

    Args:
        n_burn: sweeps that are forgotten, per chain.
        n_samples: draws that are kept, per chain.
        thin: sweeps per kept draw.
        n_chains: independent chains; two or more let `diagnostics` compare them.
        n_auxiliary: empty experts that are offered to every row.
        alpha: fix the concentration of the process instead of learning it.
        width: fix φ, in standard deviations of the inputs, instead of learning one per input.
        hyperparameters: fix (v0, w, v1) of all experts, in standardised units, instead of learning them.
        n_init_experts: experts at the start, blocks along the first input.
        random_state: seed.
        verbose: report every tenth sweep.
        n_jobs: processes for the chains.

    Attributes: `n_experts_trace_`, `alpha_trace_`, `log_likelihood_trace_` `[chains, draws]`, `coclustering_`
    `[rows, rows]` (how often two rows shared an expert), `samples_` (labels and hyperparameters of every draw),
    `acceptance_` (of the Metropolis steps), `n_iter_`.
    """

    _concentration = "alpha"

    def __init__(
        self,
        *,
        n_burn: int = 100,
        n_samples: int = 50,
        thin: int = 2,
        n_chains: int = 2,
        n_auxiliary: int = 3,
        alpha: float | None = None,
        width: float | None = None,
        hyperparameters: tuple[float, float, float] | None = None,
        n_init_experts: int = 1,
        random_state: Any = None,
        verbose: int = 0,
        n_jobs: int | None = None,
    ):
        self.n_burn = n_burn
        self.n_samples = n_samples
        self.thin = thin
        self.n_chains = n_chains
        self.n_auxiliary = n_auxiliary
        self.alpha = alpha
        self.width = width
        self.hyperparameters = hyperparameters
        self.n_init_experts = n_init_experts
        self.random_state = random_state
        self.verbose = verbose
        self.n_jobs = n_jobs

    def fit(self, X: Any, y: Any) -> Self:
        """Sample the posterior given inputs `[rows, features]` and targets `[rows]`."""
        x, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        schedule, settings = self._schedule(), self._settings(len(x))
        target = np.asarray(y, dtype=np.float64)
        self._x_center, self._x_scale = weighted_moments(x, np.ones(len(x)))
        center, scale = weighted_moments(target[:, None], np.ones(len(x)))
        self._y_center, self._y_scale = float(center[0]), float(scale[0])
        self._x = (x - self._x_center) / self._x_scale
        self._y = (target - self._y_center) / self._y_scale
        chains, rng = self._sample(partial(GPChain, self._x, self._y, settings), schedule)
        self.acceptance_ = float(np.mean([chain.acceptance for chain in chains if isinstance(chain, GPChain)]))
        self._empty_variance = self._variance_of_nobody(rng)
        return self

    def _settings(self, num_rows: int) -> Settings:
        fixed = [self.alpha, self.width, *(self.hyperparameters or ())]
        if any(value is not None and not value > 0 for value in fixed):
            raise ValueError(
                f"alpha={self.alpha}, width={self.width} and hyperparameters={self.hyperparameters} must be above 0"
            )
        num = min(self.n_init_experts, num_rows)
        return Settings(self.n_auxiliary, self.alpha, self.width, self.hyperparameters, num)

    def _variance_of_nobody(self, rng: np.random.RandomState) -> float:
        """What an expert without rows expects of a target."""
        if self.hyperparameters is not None:
            return self.hyperparameters[0] + self.hyperparameters[2]
        prior = draw_prior(self._x.shape[1], _PRIOR_DRAWS, rng)
        return float(np.mean([hyper.signal + hyper.noise for hyper in prior]))

    def _components(self, X: Any) -> tuple[Array, Array, Array]:
        """Weights, means and variances of all experts of all draws, `[rows, components]`, standardised units."""
        check_is_fitted(self)
        x = (validate_data(self, X, dtype=np.float64, reset=False) - self._x_center) / self._x_scale
        weights, means, variances = [], [], []
        for draw in self.samples_:
            share = occupation(x, self._x, draw.label, len(draw.hyper), draw.width)
            n = len(self._x)
            weights.append(share * n / (n + draw.alpha))
            weights.append(np.full((len(x), 1), draw.alpha / (n + draw.alpha)))
            for j, hyper in enumerate(draw.hyper):
                inside = draw.label == j
                mean, variance = predictive(x, self._x[inside], self._y[inside], hyper)
                means.append(mean[:, None])
                variances.append(variance[:, None])
            means.append(np.zeros((len(x), 1)))
            variances.append(np.full((len(x), 1), self._empty_variance))
        return np.hstack(weights) / len(self.samples_), np.hstack(means), np.hstack(variances)

    def predict(self, X: Any, return_std: bool = False) -> Array | tuple[Array, Array]:
        """Posterior mean of y, `[rows]`, and its standard deviation."""
        weight, mean, variance = self._components(X)
        center = (weight * mean).sum(1)
        answer = self._y_center + self._y_scale * center
        if not return_std:
            return answer
        spread = (weight * (variance + (mean - center[:, None]) ** 2)).sum(1)
        return answer, self._y_scale * np.sqrt(spread)

    def log_prob(self, X: Any, y: Any) -> Array:
        """`log p(y | x, data)` of each row, `[rows]`."""
        weight, mean, variance = self._components(X)
        target = check_array(y, dtype=np.float64, ensure_2d=False, input_name="y").reshape(-1)
        if len(target) != len(weight):
            raise ValueError(f"X has {len(weight)} rows but y has {len(target)}; pass one target per row")
        gap = ((target - self._y_center) / self._y_scale)[:, None] - mean
        with np.errstate(divide="ignore"):
            joint = np.log(weight) - 0.5 * (gap**2 / variance + np.log(2 * np.pi * variance))
        return softmax_rows(joint)[0] - np.log(self._y_scale)

    def predict_density(self, X: Any, y: Any) -> Array:
        """`p(y | x, data)` of each row, `[rows]`."""
        return np.exp(self.log_prob(X, y))

    def predict_quantiles(self, X: Any, quantiles: Any = (0.05, 0.5, 0.95)) -> Array:
        """Quantiles of `p(y | x, data)`, `[rows, quantiles]`."""
        levels = np.atleast_1d(np.asarray(quantiles, dtype=np.float64))
        if levels.min() <= 0 or levels.max() >= 1:
            raise ValueError(f"quantiles={quantiles} must lie strictly between 0 and 1")
        weight, mean, variance = self._components(X)
        deviation = np.sqrt(variance)
        low = np.repeat((mean - 40 * deviation).min(1)[:, None], len(levels), 1)
        high = np.repeat((mean + 40 * deviation).max(1)[:, None], len(levels), 1)
        for _ in range(_HALVINGS):
            middle = 0.5 * (low + high)
            below = np.stack(
                [(weight * ndtr((column[:, None] - mean) / deviation)).sum(1) for column in middle.T], axis=1
            )
            low, high = np.where(below < levels, middle, low), np.where(below < levels, high, middle)
        return self._y_center + self._y_scale * 0.5 * (low + high)

    def sample(self, X: Any, random_state: Any = None) -> Array:
        """One draw from `p(y | x, data)` for each row, `[rows]`."""
        rng = check_random_state(random_state)
        weight, mean, variance = self._components(X)
        own = np.arange(len(weight)), draw_labels(weight, rng)
        draw = mean[own] + np.sqrt(variance[own]) * rng.standard_normal(len(weight))
        return self._y_center + self._y_scale * draw
