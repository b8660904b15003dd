"""Committees of Gaussian processes: products of experts, the Bayesian committee machine and their robust forms."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from joblib import Parallel, delayed
from scipy.linalg import cho_solve, solve_triangular
from scipy.optimize import minimize
from sklearn.base import BaseEstimator, RegressorMixin, clone
from sklearn.gaussian_process.kernels import RBF, ConstantKernel
from sklearn.utils import Tags, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from moestro.mixtures.numerics import Array

AGGREGATIONS = ("poe", "gpoe", "gpoe-entropy", "bcm", "rbcm")


def committee(mean: Array, variance: Array, prior: Array, aggregation: str) -> tuple[Array, Array]:
    """Combines the experts' latent predictions by (powered) products of normal densities.

        1/σ² = sum_k β_k / σ_k² + (1 - sum_k β_k) / σ_0²   (no prior term for products of experts)
        μ = σ² sum_k β_k μ_k / σ_k²                        Deisenroth & Ng 2015, eqs. 10-21

    β_k is 1 ("poe", "bcm"), 1/M ("gpoe") or the entropy gained, ½ (log σ_0² - log σ_k²) ("gpoe-entropy" of Cao &
    Fleet 2014, "rbcm"). Only "gpoe", "bcm" and "rbcm" return to the prior far from the data. A single expert is
    the exact process under "poe", "gpoe" and "bcm"; under "rbcm" its precision is β / σ_1² + (1 - β) / σ_0², which
    is that of the process only where β = 1 or nothing was learned: the entropy gained tempers even one expert.

    Shapes: mean `[experts, rows, ...]`, variance `[experts, rows]`, prior `[rows]` -> `[rows, ...]`, `[rows]`.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation={aggregation!r} is unknown; pass one of {', '.join(AGGREGATIONS)}")
    variance = np.minimum(variance, prior)  # knowing more never widens; keeps the precision positive
    power = {
        "poe": np.ones_like(variance),
        "bcm": np.ones_like(variance),
        "gpoe": np.full_like(variance, 1 / len(variance)),
    }.get(aggregation)
    if power is None:
        power = 0.5 * (np.log(prior) - np.log(variance))
    precision = (power / variance).sum(0)
    if aggregation in ("bcm", "rbcm"):
        precision = precision + (1 - power.sum(0)) / prior
    if aggregation == "gpoe-entropy":  # no expert has learned anything: the prior
        precision = np.where(power.sum(0) > 1e-12, precision, 1 / prior)
    share = power / variance / precision
    return (share.reshape(share.shape + (1,) * (mean.ndim - 2)) * mean).sum(0), 1 / precision


class DistributedGPRegressor(RegressorMixin, BaseEstimator):
    """Gaussian process regression by experts that see a part of the rows each and share their hyperparameters.

    Training maximises `sum_k log N(y_k; 0, K_k + noise)`, which costs `rows * points_per_expert²`.

    Args:
        kernel: covariance of the noise-free function; None takes a scaled squared exponential with a length per
            input.
        noise: variance of the noise relative to that of y, the start of its fit.
        points_per_expert: rows per expert.
        n_experts: number of experts; None follows from points_per_expert.
        aggregation: "poe", "gpoe", "gpoe-entropy", "bcm" or "rbcm", see `committee`.
        partition: "random", or "segments" (blocks along the first principal axis).
        optimize: learn kernel and noise; False takes them as given.
        normalize_y: fit y centred and scaled to variance one (kernel and noise then refer to that scale).
        random_state: seed of the partition.
        n_jobs: threads for the experts.

    Attributes: `kernel_`, `noise_` (in squared units of y), `partition_` (rows of every expert),
    `log_marginal_likelihood_value_` (of the scaled targets), `n_iter_`.
    """

    def __init__(
        self,
        kernel: Any = None,
        *,
        noise: float = 0.1,
        points_per_expert: int = 256,
        n_experts: int | None = None,
        aggregation: str = "rbcm",
        partition: str = "random",
        optimize: bool = True,
        normalize_y: bool = True,
        random_state: Any = None,
        n_jobs: int | None = None,
    ):
        self.kernel = kernel
        self.noise = noise
        self.points_per_expert = points_per_expert
        self.n_experts = n_experts
        self.aggregation = aggregation
        self.partition = partition
        self.optimize = optimize
        self.normalize_y = normalize_y
        self.random_state = random_state
        self.n_jobs = n_jobs

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any) -> Self:
        """Partition the rows, learn shared hyperparameters, factor every expert's covariance.

        Args:
            X: inputs `[rows, features]`.
            y: targets `[rows]` or `[rows, outputs]`; outputs share hyperparameters.
        """
        x, y = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True)
        self._check_options(x)
        self._flat = y.ndim == 1
        target = y.reshape(len(y), -1).astype(np.float64)
        self._center = target.mean(0) if self.normalize_y else np.zeros(target.shape[1])
        spread = target.std(0)
        self._spread = np.where((spread > 0) & self.normalize_y, spread, 1.0)
        target = (target - self._center) / self._spread
        self.partition_ = self._split(x)
        self._blocks = [(x[rows], target[rows]) for rows in self.partition_]
        kernel = (
            ConstantKernel(1.0) * RBF(x.std(0) + (x.std(0) == 0)) if self.kernel is None else clone(self.kernel)
        )
        self.n_iter_ = 1
        theta = np.append(kernel.theta, np.log(self.noise))
        if self.optimize:
            bounds = np.vstack([kernel.bounds, np.log([[1e-6, 10.0]])])
            found = minimize(self._loss, theta, args=(kernel,), jac=True, bounds=bounds, method="L-BFGS-B")
            theta, self.n_iter_ = found.x, max(int(found.nit), 1)
        self.log_marginal_likelihood_value_ = -self._loss(theta, kernel)[0]
        self.kernel_ = kernel.clone_with_theta(theta[:-1])
        self._noise = float(np.exp(theta[-1]))
        noise = self._noise * self._spread**2
        self.noise_ = float(noise[0]) if self._flat else noise
        self._factors = [self._factor(block) for block in self._blocks]
        return self

    def _check_options(self, x: Array) -> None:
        if self.aggregation not in AGGREGATIONS:
            raise ValueError(f"aggregation={self.aggregation!r} is unknown; pass one of {', '.join(AGGREGATIONS)}")
        if self.partition not in ("random", "segments"):
            raise ValueError(f"partition={self.partition!r} is unknown; pass random or segments")
        if self.points_per_expert < 1 or self.noise <= 0:
            raise ValueError(
                f"points_per_expert={self.points_per_expert} must be at least 1 and noise={self.noise} above 0"
            )
        if self.n_experts is not None and not 1 <= self.n_experts <= len(x):
            raise ValueError(f"n_experts={self.n_experts} must lie between 1 and n_samples={len(x)}")

    def _split(self, x: Array) -> list[Array]:
        num = self.n_experts or max(1, round(len(x) / self.points_per_expert))
        if self.partition == "random":
            order = check_random_state(self.random_state).permutation(len(x))
        else:
            centred = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1.0)
            order = np.argsort(centred @ np.linalg.svd(centred, full_matrices=False)[2][0], kind="stable")
        return [np.sort(rows) for rows in np.array_split(order, num)]

    def _loss(self, theta: Array, kernel: Any) -> tuple[float, Array]:
        now = kernel.clone_with_theta(theta[:-1])
        parts = Parallel(n_jobs=self.n_jobs, prefer="threads")(
            delayed(_log_marginal)(now, float(np.exp(theta[-1])), block) for block in self._blocks
        )
        value, slope = (sum(column) for column in zip(*parts, strict=True))
        return -float(value), -np.asarray(slope)

    def _factor(self, block: tuple[Array, Array]) -> tuple[Array, Array]:
        x, y = block
        lower = np.linalg.cholesky(self.kernel_(x) + self._noise * np.eye(len(x)))
        return lower, cho_solve((lower, True), y)

    def predict(self, X: Any, return_std: bool = False) -> Array | tuple[Array, Array]:
        """Mean of y, and its standard deviation with the noise added once, after the committee.

        Shapes: `[rows]` or `[rows, outputs]`, as y was given.
        """
        check_is_fitted(self)
        x = validate_data(self, X, dtype=np.float64, reset=False)
        mean, variance = self.predict_experts(x)
        center, spread = committee(mean, variance, self.kernel_.diag(x), self.aggregation)
        center = center * self._spread + self._center
        std = np.sqrt(spread + self._noise)[:, None] * self._spread
        if self._flat:
            center, std = center[:, 0], std[:, 0]
        return (center, std) if return_std else center

    def predict_experts(self, X: Any) -> tuple[Array, Array]:
        """Latent means `[experts, rows, outputs]` and variances `[experts, rows]` of the scaled targets."""
        check_is_fitted(self)
        x = validate_data(self, X, dtype=np.float64, reset=False)
        prior = self.kernel_.diag(x)
        means, variances = [], []
        for (seen, _), (lower, weights) in zip(self._blocks, self._factors, strict=True):
            cross = self.kernel_(x, seen)
            means.append(np.einsum("tk,kq->tq", cross, weights))
            solved = solve_triangular(lower, cross.T, lower=True)
            variances.append(np.maximum(prior - np.einsum("kt,kt->t", solved, solved), 1e-12 * prior))
        return np.stack(means), np.stack(variances)


def _log_marginal(kernel: Any, noise: float, block: tuple[Array, Array]) -> tuple[float, Array]:
    x, y = block
    covariance, slopes = kernel(x, eval_gradient=True)
    try:
        lower = np.linalg.cholesky(covariance + noise * np.eye(len(x)))
    except np.linalg.LinAlgError:
        return -1e25, np.zeros(slopes.shape[2] + 1)
    weights = cho_solve((lower, True), y)
    half_volume = np.log(np.diag(lower)).sum() + 0.5 * len(x) * np.log(2 * np.pi)
    value = -0.5 * float(np.vdot(y, weights)) - y.shape[1] * half_volume
    inner = weights @ weights.T - y.shape[1] * cho_solve((lower, True), np.eye(len(x)))
    slope = 0.5 * np.einsum("ab,abk->k", inner, slopes)
    return value, np.append(slope, 0.5 * noise * np.trace(inner))
