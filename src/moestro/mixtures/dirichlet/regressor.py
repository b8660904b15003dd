"""The infinite mixture of Gaussian process experts, sampled (Rasmussen & Ghahramani 2001)."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from joblib import Parallel, delayed
from scipy.special import ndtr
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from moestro.mixtures.dirichlet.gp_chain import Draw, GPChain, Hyper, Settings, draw_prior, occupation, predictive
from moestro.mixtures.dirichlet.mcmc import diagnose
from moestro.mixtures.numerics import Array, softmax_rows, weighted_moments

_PRIOR_DRAWS = 20  # of an empty expert's variance, at prediction
_HALVINGS = 60  # halvings of a quantile's bracket


class DirichletProcessMixtureOfExpertsRegressor(RegressorMixin, BaseEstimator):
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
        settings = self._settings(len(x))
        target = np.asarray(y, dtype=np.float64)
        self._x_center, self._x_scale = weighted_moments(x, np.ones(len(x)))
        center, scale = weighted_moments(target[:, None], np.ones(len(x)))
        self._y_center, self._y_scale = float(center[0]), float(scale[0])
        self._x = (x - self._x_center) / self._x_scale
        self._y = (target - self._y_center) / self._y_scale
        rng = check_random_state(self.random_state)
        seeds = rng.randint(2**31 - 1, size=self.n_chains)
        chains = Parallel(n_jobs=self.n_jobs)(
            delayed(GPChain.sample)(self._x, self._y, settings, int(seed), number)
            for number, seed in enumerate(seeds)
        )
        self._keep(chains, draw_prior(self._x.shape[1], _PRIOR_DRAWS, np.random.RandomState(int(seeds[0]))))
        self.n_iter_ = self.n_burn + self.n_samples * self.thin
        return self

    def _settings(self, num_rows: int) -> Settings:
        counts = (self.n_samples, self.thin, self.n_chains, self.n_auxiliary, self.n_init_experts)
        fixed = [self.alpha, self.width, *(self.hyperparameters or ())]
        if min(counts) < 1 or self.n_burn < 0:
            raise ValueError(
                f"n_samples={self.n_samples}, thin={self.thin}, n_chains={self.n_chains}, "
                f"n_auxiliary={self.n_auxiliary} and n_init_experts={self.n_init_experts} must be at least 1 and "
                f"n_burn={self.n_burn} at least 0"
            )
        if any(value is not None and not value > 0 for value in fixed):
            raise ValueError(
                f"alpha={self.alpha}, width={self.width} and hyperparameters={self.hyperparameters} must be above 0"
            )
        return Settings(
            self.n_burn,
            self.n_samples,
            self.thin,
            self.n_auxiliary,
            self.alpha,
            self.width,
            self.hyperparameters,
            min(self.n_init_experts, num_rows),
            self.verbose,
        )

    def _keep(self, chains: list[GPChain], prior: list[Hyper]) -> None:
        self.samples_: list[Draw] = [draw for chain in chains for draw in chain.draws]
        self.n_experts_trace_ = np.array([[len(draw.hyper) for draw in chain.draws] for chain in chains])
        self.alpha_trace_ = np.array([[draw.alpha for draw in chain.draws] for chain in chains])
        self.log_likelihood_trace_ = np.array([[draw.log_likelihood for draw in chain.draws] for chain in chains])
        self.acceptance_ = float(np.mean([chain.acceptance for chain in chains]))
        together = np.zeros((len(self._x), len(self._x)))
        for draw in self.samples_:
            together += draw.label[:, None] == draw.label
        self.coclustering_ = together / len(self.samples_)
        self._empty_variance = float(np.mean([hyper.signal + hyper.noise for hyper in prior]))
        if self.hyperparameters is not None:
            self._empty_variance = self.hyperparameters[0] + self.hyperparameters[2]

    def diagnostics(self) -> dict[str, dict[str, float]]:
        """Mean, deviation, effective sample size and split R-hat of the label-free traces.

        R-hat above about 1.05 or fewer than some dozens of effective draws ask for longer chains.
        """
        check_is_fitted(self)
        return diagnose(
            {
                "n_experts": self.n_experts_trace_.astype(np.float64),
                "alpha": self.alpha_trace_,
                "log_likelihood": self.log_likelihood_trace_,
            }
        )

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
        chosen = (weight.cumsum(1) < rng.random_sample(len(weight))[:, None]).sum(1)
        own = np.arange(len(weight)), np.minimum(chosen, weight.shape[1] - 1)
        draw = mean[own] + np.sqrt(variance[own]) * rng.standard_normal(len(weight))
        return self._y_center + self._y_scale * draw
