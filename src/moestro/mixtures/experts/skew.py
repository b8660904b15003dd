"""Skew experts: asymmetric errors, with normal or heavy tails (Chamroukhi 2016, 2017)."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
from scipy.special import betaln, gammaln, log_ndtr, ndtr, owens_t, stdtr, stdtrit

from moestro.mixtures.experts.base import Expert, keep_empty, planes
from moestro.mixtures.experts.student import log_t_constant
from moestro.mixtures.gates.base import Effort, Params
from moestro.mixtures.numerics import Array, is_empty, least_squares
from moestro.mixtures.rows import Rows, Scaling

_HALF_NORMAL = np.sqrt(2 / np.pi)
_MOST_SKEW = 0.999999


def log_t_cdf(dof: Array, x: Array) -> Array:
    """Logarithm of Student's distribution function, by its tail series where it underflows."""
    value = stdtr(dof, x)
    far = value < 1e-290
    if not far.any():
        return np.log(value)
    x = np.where(far, x, -1.0)
    tail = -betaln(dof / 2, 0.5) - np.log(dof) - 0.5 * dof * np.log1p(x**2 / dof) - 0.5 * np.log1p(dof / x**2)
    return np.where(far, tail, np.log(np.where(far, 1.0, value)))


class SkewExpert(Expert):
    """What both families share: location `μ = βᵀ[1, x]`, scale σ and skewness `δ = λ / sqrt(1 + λ²)` in (-1, 1).

    Errors are `δ|U| + sqrt(1 - δ²) e` with equal scales of U and e, divided by the root of a gamma weight for the
    t family; the conditional moments of |U| are the E-step, and β, σ, δ are maximised in turn (ECM).
    `predict` gives the mean, which is not the location.

    Parameters: `coef` `[experts, p, 1]`, `scale`, `delta` `[experts]`, and what a family adds.
    """

    @abstractmethod
    def _log_standard(self, params: Params, d: Array) -> Array:
        """Log-density of standardised errors `[rows, experts]`."""

    @abstractmethod
    def _moments(self, params: Params, d: Array) -> tuple[Array, Array, Array]:
        """Expected weight w, w|U| and w U² of standardised errors, given the row."""

    @abstractmethod
    def _first_shape(self, num_experts: int) -> Params:
        """What a family adds at the start."""

    @abstractmethod
    def _more_shape(self, moved: Params, rows: Rows, mass: Array) -> Params:
        """What a family adds, refitted."""

    @abstractmethod
    def _standard_mean(self, params: Params) -> Array:
        """Mean of a standardised error `[experts]`."""

    @abstractmethod
    def _standard_variance(self, params: Params) -> Array:
        """Variance of a standardised error `[experts]`."""

    def _distance(self, params: Params, z: Array, y: Array) -> Array:
        return (y - z @ params["coef"][:, :, 0].T) / params["scale"]

    def m_step(self, rows: Rows, mass: Array, params: Params | None, effort: Effort) -> Params:
        none = np.zeros(rows.z.shape[1])
        total = np.maximum(mass.sum(0), 1e-300)
        if params is None:
            return self._first(rows, mass, total)
        distance = self._distance(params, rows.z, rows.y)
        weight, first, second = self._moments(params, distance)
        scale, delta = params["scale"], params["delta"]
        first, second = first * scale, second * scale**2
        response = (weight * rows.y - delta * first) / weight
        coef = least_squares(rows.z, response[:, :, None], mass * weight, none)
        error = rows.y - rows.z @ coef[:, :, 0].T
        square, cross = np.einsum("te,te->e", mass, weight * error**2), np.einsum("te,te->e", mass, error * first)
        latent = np.einsum("te,te->e", mass, second)
        variance = (square - 2 * delta * cross + latent) / (2 * (1 - delta**2) * total)
        variance = np.maximum(variance, rows.floor)
        delta = _solve_delta(variance * total, cross, square + latent)
        moved = {**params, "coef": coef, "scale": np.sqrt(variance), "delta": delta}
        return keep_empty(self._more_shape(moved, rows, mass), params, is_empty(mass.sum(0), rows.total))

    def _first(self, rows: Rows, mass: Array, total: Array) -> Params:
        coef = least_squares(rows.z, rows.y, mass, np.zeros(rows.z.shape[1]))
        error = rows.y - rows.z @ coef[:, :, 0].T
        variance = np.maximum(np.einsum("te,te->e", mass, error**2) / total, rows.floor)
        third = np.einsum("te,te->e", mass, error**3)
        delta, scale = np.where(third >= 0, 0.5, -0.5), np.sqrt(1.5 * variance)
        coef[:, 0, 0] -= delta * scale * _HALF_NORMAL
        return {"coef": coef, "scale": scale, "delta": delta, **self._first_shape(len(coef))}

    def log_prob(self, params: Params, z: Array, y: Array) -> Array:
        return self._log_standard(params, self._distance(params, z, y)) - np.log(params["scale"])

    def mean(self, params: Params, z: Array) -> Array:
        return (z @ params["coef"][:, :, 0].T + params["scale"] * self._standard_mean(params))[:, :, None]

    def variance(self, params: Params, z: Array) -> Array:
        each = params["scale"] ** 2 * self._standard_variance(params)
        return np.broadcast_to(each[:, None], (len(z), len(each), 1))

    def sample(self, params: Params, z: Array, label: Array, rng: np.random.RandomState) -> Array:
        delta = params["delta"][label]
        noise = delta * np.abs(rng.standard_normal(len(z)))
        noise += np.sqrt(1 - delta**2) * rng.standard_normal(len(z))
        if "dof" in params:
            dof = params["dof"][label]
            noise /= np.sqrt(rng.chisquare(dof) / dof)
        center = (z @ params["coef"][:, :, 0].T)[np.arange(len(z)), label]
        return (center + params["scale"][label] * noise)[:, None]

    def count(self, params: Params) -> int:
        return sum(int(value.size) for value in params.values())

    def attributes(self, params: Params, scaling: Scaling) -> dict[str, Any]:
        found = {
            **planes(params["coef"], scaling),
            "expert_scale_": params["scale"] * scaling.y_scale,
            "expert_skew_": params["delta"] / np.sqrt(1 - params["delta"] ** 2),
        }
        return {**found, "expert_dof_": params["dof"].copy()} if "dof" in params else found

    def free(self, params: Params) -> Array:
        shape = [np.log(params["dof"])] if "dof" in params else []
        return np.concatenate(
            [params["coef"].ravel(), np.log(params["scale"]), np.arctanh(params["delta"]), *shape]
        )

    def restore(self, numbers: Array, like: Params) -> Params:
        num, size = len(like["scale"]), like["coef"].size
        coef, scale, delta, dof = np.split(numbers, [size, size + num, size + 2 * num])
        found = {"coef": coef.reshape(like["coef"].shape), "scale": np.exp(scale), "delta": np.tanh(delta)}
        return {**found, "dof": np.exp(dof)} if "dof" in like else found

    def gradient(self, rows: Rows, mass: Array, params: Params) -> Array:
        distance = self._distance(params, rows.z, rows.y)
        step = 1e-5
        rise = self._log_standard(params, distance + step) - self._log_standard(params, distance - step)
        by_distance = mass * rise / (2 * step)
        by_coef = -(by_distance.T @ rows.z) / params["scale"][:, None]
        by_scale = -np.einsum("te,te->e", by_distance, distance) - mass.sum(0)
        parts = [by_coef.ravel(), by_scale]
        for name, there, back in (("delta", np.arctanh, np.tanh), ("dof", np.log, np.exp)):
            if name in params:
                above, below = (
                    self._log_standard({**params, name: back(there(params[name]) + sign * step)}, distance)
                    for sign in (1, -1)
                )
                parts.append(np.einsum("te,te->e", mass, above - below) / (2 * step))
        return np.concatenate(parts)


def _solve_delta(spread: Array, cross: Array, square: Array) -> Array:
    """Root in (-1, 1) of `-spread δ³ + cross δ² + (spread - square) δ + cross`, one per expert."""
    each = zip(spread.tolist(), cross.tolist(), square.tolist(), strict=True)
    return np.array([_root_of_cubic(*numbers) for numbers in each])


def _root_of_cubic(spread: float, cross: float, square: float) -> float:
    """Bisection, then two Newton steps; plain numbers are ten times faster than arrays of a few experts."""
    low, high, linear = -_MOST_SKEW, _MOST_SKEW, spread - square
    for _ in range(24):
        middle = 0.5 * (low + high)
        if ((-spread * middle + cross) * middle + linear) * middle + cross > 0:
            low = middle
        else:
            high = middle
    root = 0.5 * (low + high)
    for _ in range(2):
        value = ((-spread * root + cross) * root + linear) * root + cross
        slope = (-3 * spread * root + 2 * cross) * root + linear
        root = min(max(root - value / slope, low), high) if slope < 0 else root
    return root


class SkewNormalExpert(SkewExpert):
    """Skew-normal errors: `f(y) = (2/σ) φ(d) Φ(λ d)`, `d = (y - μ)/σ` (Chamroukhi 2016)."""

    def _log_standard(self, params: Params, d: Array) -> Array:
        slant = params["delta"] / np.sqrt(1 - params["delta"] ** 2)
        return np.log(2) - 0.5 * np.log(2 * np.pi) - 0.5 * d**2 + log_ndtr(slant * d)

    def _moments(self, params: Params, d: Array) -> tuple[Array, Array, Array]:
        delta = params["delta"]
        spread = np.sqrt(1 - delta**2)
        at = delta / spread * d
        ratio = np.exp(-0.5 * at**2 - 0.5 * np.log(2 * np.pi) - log_ndtr(at))
        center = delta * d
        return np.ones_like(d), center + spread * ratio, center**2 + spread**2 + spread * center * ratio

    def _first_shape(self, num_experts: int) -> Params:
        return {}

    def _more_shape(self, moved: Params, rows: Rows, mass: Array) -> Params:
        return moved

    def _standard_mean(self, params: Params) -> Array:
        return params["delta"] * _HALF_NORMAL

    def _standard_variance(self, params: Params) -> Array:
        return 1 - 2 * params["delta"] ** 2 / np.pi

    def cdf(self, params: Params, z: Array, y: Array) -> Array:
        distance = self._distance(params, z, y)
        slant = params["delta"] / np.sqrt(1 - params["delta"] ** 2)
        return (ndtr(distance) - 2 * owens_t(distance, slant))[:, :, None]


class SkewTExpert(SkewExpert):
    """Skew-t errors: `f(y) = (2/σ) t_ν(d) T_ν+1(λ d sqrt((ν+1)/(ν+d²)))` (Chamroukhi 2017).

    ν in [1.1, 100] maximises the likelihood given the rest (ECME). `expert_dof_` below 2 means no variance.

    Args:
        dof: fix ν at this number for all experts; None learns one per expert.
    """

    def __init__(self, dof: float | None = None):
        self.dof = dof

    @staticmethod
    def _slanted(params: Params, d: Array) -> Array:
        dof = params["dof"]
        return params["delta"] / np.sqrt(1 - params["delta"] ** 2) * d * np.sqrt((dof + 1) / (dof + d**2))

    def _log_standard(self, params: Params, d: Array) -> Array:
        dof = params["dof"]
        body = log_t_constant(dof, 1) - 0.5 * (dof + 1) * np.log1p(d**2 / dof)
        return np.log(2) + body + log_t_cdf(dof + 1, self._slanted(params, d))

    def _moments(self, params: Params, d: Array) -> tuple[Array, Array, Array]:
        dof, delta = params["dof"], params["delta"]
        slanted = self._slanted(params, d)
        ratio = np.exp(log_t_cdf(dof + 3, slanted * np.sqrt((dof + 3) / (dof + 1))) - log_t_cdf(dof + 1, slanted))
        weight = (dof + 1) / (dof + d**2) * ratio
        rest = 1 - delta**2
        bulge = 0.5 * np.log(rest) - np.log(np.pi) - self._log_standard(params, d)
        bulge = np.exp(bulge - (dof / 2 + 1) * np.log1p(d**2 / (dof * rest)))
        first = delta * d * weight + bulge
        return weight, first, delta**2 * d**2 * weight + rest + delta * d * bulge

    def _first_shape(self, num_experts: int) -> Params:
        return {"dof": np.full(num_experts, float(self.dof or 15.0))}

    def _more_shape(self, moved: Params, rows: Rows, mass: Array) -> Params:
        if self.dof is not None:
            return moved
        distance, now = self._distance(moved, rows.z, rows.y), moved["dof"]
        best = np.einsum("te,te->e", mass, self._log_standard(moved, distance))

        def value(dof: Array) -> Array:
            return np.einsum("te,te->e", mass, self._log_standard({**moved, "dof": dof}, distance))

        above, below = value(now * 1.1), value(now / 1.1)
        bend = above - 2 * best + below  # a parabola in log ν, or a long step where it has no top
        with np.errstate(divide="ignore", invalid="ignore"):
            stride = np.where(bend < 0, 0.5 * (below - above) / bend, 6 * np.sign(above - below))
        tried = np.clip(now * 1.1 ** np.clip(stride, -6, 6), 1.1, 100.0)
        return {**moved, "dof": np.where(value(tried) > best, tried, now)}

    def _standard_mean(self, params: Params) -> Array:
        dof = params["dof"]
        return params["delta"] * np.sqrt(dof / np.pi) * np.exp(gammaln((dof - 1) / 2) - gammaln(dof / 2))

    def _standard_variance(self, params: Params) -> Array:
        dof = params["dof"]
        with np.errstate(divide="ignore"):
            second = np.where(dof > 2, dof / np.maximum(dof - 2, 0), np.inf)
        return second - self._standard_mean(params) ** 2

    def count(self, params: Params) -> int:
        return super().count(params) - (0 if self.dof is None else len(params["dof"]))

    def free(self, params: Params) -> Array:
        if self.dof is None:
            return super().free(params)
        return super().free({name: value for name, value in params.items() if name != "dof"})

    def restore(self, numbers: Array, like: Params) -> Params:
        if self.dof is None:
            return super().restore(numbers, like)
        rest = {name: value for name, value in like.items() if name != "dof"}
        return {**super().restore(numbers, rest), "dof": like["dof"]}

    def gradient(self, rows: Rows, mass: Array, params: Params) -> Array:
        found = super().gradient(rows, mass, params)
        return found if self.dof is None else found[: -len(params["dof"])]

    def cdf(self, params: Params, z: Array, y: Array) -> Array:
        """By Gauss-Legendre quadrature over the probabilities of the symmetric t."""
        distance, dof = self._distance(params, z, y), params["dof"]
        top = stdtr(dof, distance)
        nodes, weights = np.polynomial.legendre.leggauss(48)
        total = np.zeros_like(top)
        for node, weight in zip(nodes, weights, strict=True):
            at = stdtrit(dof, np.clip(top * 0.5 * (node + 1), 1e-300, 1 - 1e-16))
            total += weight * stdtr(dof + 1, self._slanted(params, at))
        return (top * total)[:, :, None]
