"""Gaussian process experts, fitted by variational EM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.linalg import cho_solve, solve_triangular
from scipy.optimize import minimize
from scipy.special import ndtr
from sklearn.base import clone
from sklearn.gaussian_process.kernels import RBF, ConstantKernel

from moestro.mixtures.experts.base import Expert, keep_empty
from moestro.mixtures.experts.memory import Learned
from moestro.mixtures.gates.base import Effort, Params
from moestro.mixtures.numerics import Array, is_empty
from moestro.mixtures.rows import Rows, Scaling

_NOTHING = 1e-12
_FIRST_STEPS = 25  # of the hyperparameters' ascent from the start's shares
_LATER_STEPS = 5
_MOVED = 0.05  # part of an expert's mass that moves before its hyperparameters are learned anew
_LEAST_NOISE = 1e-4  # relative to the variance of y: below, rounding spoils the bound


@dataclass(frozen=True)
class _Posterior:
    """One expert's function given its softly assigned rows. `root` is `sqrt(mass / σ²)` of each row."""

    kernel: Any
    noise: float
    x: Array
    root: Array
    lower: Array
    pull: Array
    divergence: float
    freedom: float
    learned: Learned | None  # from what kernel and noise were last learned together

    def predict(self, x: Array) -> tuple[Array, Array]:
        """Mean and variance of the function, `[rows]` each."""
        prior = self.kernel.diag(x)
        if len(self.x) == 0:
            return np.zeros(len(x)), prior
        cross = self.kernel(x, self.x)
        solved = solve_triangular(self.lower, self.root[:, None] * cross.T, lower=True)
        return cross @ self.pull, np.maximum(prior - np.einsum("kt,kt->t", solved, solved), 1e-12 * prior)


class GaussianProcessExpert(Expert):
    """Functions with a Gaussian process prior and normal noise of their own.

        f_i ~ GP(0, k_i),   y | x, i ~ N(f_i(x), σ_i²)

    EM climbs the variational bound `sum_t w_t log sum_i g_i(x_t) exp E[log N(y_t; f_i(x_t), σ_i²)] - sum_i KL(f_i
    | prior)`: given the shares, row t belongs to expert i with noise `σ_i² / h_ti`. The noise moves every step,
    kernel and noise together raise `log ∫ prod_t N(y_t; f(x_t), σ²)^h_t dGP(f)` by a few L-BFGS steps whenever a
    twentieth of the expert's rows has moved. σ² stays above 1e-4 of the variance of y. Reported densities are
    those of new targets, `N(y; E f, Var f + σ²)`. One expert is a Gaussian process regression. The cost is
    `experts * rows³` per step. Mixtures of processes with shares from a Dirichlet process are sampled by
    `DirichletProcessMixtureOfExpertsRegressor`.

    Args:
        kernel: covariance on standardised inputs and targets; None takes a squared exponential plus a constant.
        noise: first σ², relative to the variance of y.
        optimize: learn kernel and noise; False takes them as given.
        max_rows: refuse more rows than this.

    Raises:
        ValueError: for more than max_rows rows.

    Parameters: `process` `[experts]`, `noise` `[experts]`.
    """

    parametric = False

    def __init__(self, kernel: Any = None, noise: float = 0.1, optimize: bool = True, max_rows: int = 2000):
        self.kernel = kernel
        self.noise = noise
        self.optimize = optimize
        self.max_rows = max_rows

    def _refit(self, old: _Posterior | None, rows: Rows, mass: Array, floor: float) -> _Posterior:
        used = mass > _NOTHING
        block = rows.z[used, 1:], rows.y[used, 0], mass[used]
        if old is None:
            kernel = ConstantKernel(1.0) * RBF(1.0) + ConstantKernel(1.0) if self.kernel is None else self.kernel
            old = _posterior(clone(kernel), max(self.noise, floor), block, None)
        if not (self.optimize and used.any()):
            return _posterior(old.kernel, old.noise, block, None)
        if old.learned is None or old.learned.moved(rows.z, mass, _MOVED):
            steps = _FIRST_STEPS if old.learned is None else _LATER_STEPS
            learned = Learned(rows.z, mass)
            return _posterior(*_learn(old.kernel, old.noise, block, floor, steps), block, learned)
        now = _posterior(old.kernel, old.noise, block, old.learned)
        mean, spread = now.predict(block[0])
        noise = float(block[2] @ ((block[1] - mean) ** 2 + spread) / block[2].sum())
        return _posterior(old.kernel, max(noise, floor), block, old.learned)

    def m_step(self, rows: Rows, mass: Array, params: Params | None, effort: Effort) -> Params:
        if len(rows.z) > self.max_rows:
            raise ValueError(
                f"Gaussian process experts cost rows³ and X has {len(rows.z)} rows; "
                f"pass max_rows to allow more than {self.max_rows}, or use DistributedGPRegressor"
            )
        num, floor = mass.shape[1], max(rows.floor, _LEAST_NOISE)
        found = np.empty(num, dtype=object)
        for i in range(num):
            old = None if params is None else params["process"][i]
            found[i] = self._refit(old, rows, mass[:, i], floor)
        new = {"process": found, "noise": np.array([each.noise for each in found])}
        return keep_empty(new, params, is_empty(mass.sum(0), rows.total))

    def _moments(self, params: Params, z: Array) -> tuple[Array, Array]:
        """Mean and variance of every expert's function, `[rows, experts]` each."""
        both = [each.predict(z[:, 1:]) for each in params["process"]]
        return np.stack([mean for mean, _ in both], axis=1), np.stack([spread for _, spread in both], axis=1)

    def expected_log_prob(self, params: Params, z: Array, y: Array) -> Array:
        mean, spread = self._moments(params, z)
        noise = params["noise"]
        return -0.5 * (((y - mean) ** 2 + spread) / noise + np.log(2 * np.pi * noise))

    def log_prob(self, params: Params, z: Array, y: Array) -> Array:
        mean, spread = self._moments(params, z)
        total = spread + params["noise"]
        return -0.5 * ((y - mean) ** 2 / total + np.log(2 * np.pi * total))

    def mean(self, params: Params, z: Array) -> Array:
        return self._moments(params, z)[0][:, :, None]

    def variance(self, params: Params, z: Array) -> Array:
        return (self._moments(params, z)[1] + params["noise"])[:, :, None]

    def cdf(self, params: Params, z: Array, y: Array) -> Array:
        mean, spread = self._moments(params, z)
        return ndtr((y[:, None, :] - mean[:, :, None]) / np.sqrt(spread + params["noise"])[:, :, None])

    def sample(self, params: Params, z: Array, label: Array, rng: np.random.RandomState) -> Array:
        mean, spread = self._moments(params, z)
        own = np.arange(len(z)), label
        draw = mean[own] + rng.standard_normal(len(z)) * np.sqrt(spread[own] + params["noise"][label])
        return draw[:, None]

    def penalty(self, params: Params, rows: Rows) -> float:
        return sum(each.divergence for each in params["process"])

    def count(self, params: Params) -> int:
        """Effective degrees of freedom of the smoothers and one noise each, rounded."""
        return round(sum(each.freedom for each in params["process"])) + len(params["noise"])

    def attributes(self, params: Params, scaling: Scaling) -> dict[str, Any]:
        return {
            "expert_kernels_": [each.kernel for each in params["process"]],
            "expert_noise_": params["noise"] * scaling.y_scale**2,
        }


Block = tuple[Array, Array, Array]  # inputs, targets, mass of the rows


def _posterior(kernel: Any, noise: float, block: Block, learned: Learned | None) -> _Posterior:
    x, y, mass = block
    root = np.sqrt(mass / noise)
    covariance = kernel(x) if len(x) else np.zeros((0, 0))
    lower = np.linalg.cholesky(np.eye(len(x)) + root[:, None] * covariance * root)
    pull = root * cho_solve((lower, True), root * y) if len(x) else np.zeros(0)
    half = solve_triangular(lower, np.eye(len(x)), lower=True) if len(x) else lower
    freedom = len(x) - float((half**2).sum())
    energy = float(pull @ covariance @ pull)
    divergence = 0.5 * (energy - freedom) + float(np.log(np.diag(lower)).sum())
    return _Posterior(kernel, noise, x, root, lower, pull, divergence, freedom, learned)


def _evidence(theta: Array, kernel: Any, block: Block) -> tuple[float, Array]:
    """`-log ∫ prod_t N(y_t; f(x_t), σ²)^mass_t dGP(f)` and its gradient in (kernel's theta, log σ²).

    Leaves the kernel at theta.
    """
    x, y, mass = block
    noise = float(np.exp(theta[-1]))
    kernel.theta = theta[:-1]
    covariance, slopes = kernel(x, eval_gradient=True)
    root = np.sqrt(mass / noise)
    try:
        lower = np.linalg.cholesky(np.eye(len(x)) + root[:, None] * covariance * root)
    except np.linalg.LinAlgError:
        return 1e25, np.zeros_like(theta)
    inverse = root[:, None] * cho_solve((lower, True), np.diag(root))
    pull = inverse @ y
    value = -0.5 * float(mass.sum() * np.log(2 * np.pi * noise) + y @ pull) - float(np.log(np.diag(lower)).sum())
    by_kernel = 0.5 * np.einsum("ab,abk->k", np.outer(pull, pull) - inverse, slopes)
    error = y - covariance @ pull
    spread = np.diag(covariance) - np.einsum("ab,ab->a", covariance @ inverse, covariance)
    by_noise = 0.5 * float(mass @ (error**2 + spread) / noise - mass.sum())
    return -value, -np.append(by_kernel, by_noise)


def _learn(kernel: Any, noise: float, block: Block, floor: float, steps: int) -> tuple[Any, float]:
    start = np.append(kernel.theta, np.log(max(noise, floor)))
    bounds = np.vstack([kernel.bounds, [[np.log(floor), np.log(1e3)]]])
    moving, values = clone(kernel), []

    def objective(theta: Array) -> tuple[float, Array]:
        value, slope = _evidence(theta, moving, block)
        values.append(value)
        return value, slope

    options = {"maxiter": steps, "maxls": 10}
    found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    best = found.x if found.fun <= values[0] else start
    return kernel.clone_with_theta(best[:-1]), float(np.exp(best[-1]))
