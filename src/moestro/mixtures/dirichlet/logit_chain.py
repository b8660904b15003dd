"""One Markov chain of the Dirichlet process mixture of multinomial logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moestro.mixtures.dirichlet.mcmc import Chain, log_concentration_density, slice_sample
from moestro.mixtures.numerics import Array, softmax_rows

_SPREAD_MEAN, _SPREAD_STD = -1.0, 1.0  # of the log variances of a component's inputs
_CONCENTRATION = (-3.0, 2.0)  # mean and deviation of log γ
_SCALES = (0.0, 1.0)  # of log τ² and log ν²


class Components(NamedTuple):
    """All components: means and log variances of the inputs, and coefficients `[components, classes, 1 + d]`."""

    mean: Array
    log_variance: Array
    coef: Array

    def pick(self, which: Array | slice) -> Components:
        return Components(self.mean[which], self.log_variance[which], self.coef[which])

    def join(self, other: Components) -> Components:
        pairs = zip(self, other, strict=True)
        return Components(*(np.concatenate(pair) for pair in pairs))


class Draw(NamedTuple):
    """One state of the chain."""

    label: Array
    components: Components
    size: Array
    concentration: float
    scales: Array
    log_likelihood: float

    @property
    def num_experts(self) -> int:
        return len(self.size)


@dataclass(frozen=True)
class Settings:
    """How the chain starts and moves, and what is fixed instead of learned."""

    n_auxiliary: int
    concentration: float | None
    n_init_experts: int


def draw_components(
    num: int, num_features: int, num_classes: int, scales: Array, rng: np.random.RandomState
) -> Components:
    """Components from the base measure; `scales` are the variances τ² of intercepts and ν² of slopes."""
    coef = rng.standard_normal((num, num_classes, 1 + num_features))
    coef[:, :, 0] *= np.sqrt(scales[0])
    coef[:, :, 1:] *= np.sqrt(scales[1])
    spread = _SPREAD_MEAN + _SPREAD_STD * rng.standard_normal((num, num_features))
    return Components(rng.standard_normal((num, num_features)), spread, coef)


def log_inputs(x: Array, components: Components) -> Array:
    """Log-densities of the inputs under every component, `[rows, components]`."""
    gap = x[:, None] - components.mean
    inside = gap**2 * np.exp(-components.log_variance) + components.log_variance + np.log(2 * np.pi)
    return -0.5 * inside.sum(2)


def log_classes(x: Array, components: Components) -> Array:
    """Log-probabilities of the classes, `[rows, components, classes]`."""
    logits = np.einsum("tp,kcp->tkc", np.column_stack([np.ones(len(x)), x]), components.coef)
    top = logits.max(2, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(2, keepdims=True))


class LogitChain(Chain):
    """The state, and the moves that leave the posterior as it is."""

    def __init__(self, x: Array, target: Array, num_classes: int, settings: Settings, seed: int):
        self.x, self.target, self.num_classes, self.settings = x, target, num_classes, settings
        self.rng = np.random.RandomState(seed)
        self.scales = np.ones(2)
        self.concentration = settings.concentration or 0.1
        self.label = self._first_labels()
        num, width = int(self.label.max()) + 1, x.shape[1]
        self.components = Components(
            np.zeros((num, width)), np.zeros((num, width)), np.zeros((num, num_classes, 1 + width))
        )
        for j in range(num):
            self._component_step(j)

    def _first_labels(self) -> Array:
        """A few rounds of k-means of the inputs, empty clusters left out."""
        centers = self.x[self.rng.permutation(len(self.x))[: self.settings.n_init_experts]]
        for _ in range(10):
            label = ((self.x[:, None] - centers) ** 2).sum(2).argmin(1)
            label = np.unique(label, return_inverse=True)[1]
            centers = np.stack([self.x[label == j].mean(0) for j in range(label.max() + 1)])
        return np.asarray(label, dtype=np.int64)

    def state(self) -> Draw:
        """What is kept of one sweep."""
        value = self.log_densities(self.x, self.target, self.components)[np.arange(len(self.x)), self.label].sum()
        count = np.bincount(self.label, minlength=len(self.components.mean)).astype(np.float64)
        return Draw(self.label.copy(), self.components, count, self.concentration, self.scales.copy(), float(value))

    def sweep(self) -> None:
        """All labels, then every component, the prior scales and the concentration."""
        self._labels()
        for j in range(len(self.components.mean)):
            self._component_step(j)
        self._scale_step()
        if self.settings.concentration is None:
            drawn = slice_sample(self._concentration_density, np.log(self.concentration), 1.0, self.rng)
            self.concentration = float(np.exp(drawn))

    def log_densities(self, x: Array, target: Array, components: Components) -> Array:
        """Of inputs and class together under every component, `[rows, components]`."""
        by_class = log_classes(x, components)[np.arange(len(x)), :, target]
        return log_inputs(x, components) + by_class

    def _labels(self) -> None:
        """Neal 2000, algorithm 8. The auxiliary components of every row are drawn at once."""
        n, m = len(self.x), self.settings.n_auxiliary
        known = self.log_densities(self.x, self.target, self.components)  # [rows, components], grows
        offered = draw_components(n * m, self.x.shape[1], self.num_classes, self.scales, self.rng)
        fresh = np.stack(
            [
                self.log_densities(
                    self.x[t : t + 1], self.target[t : t + 1], offered.pick(slice(t * m, t * m + m))
                )[0]
                for t in range(n)
            ]
        )
        count = np.bincount(self.label, minlength=known.shape[1]).astype(np.float64)
        lot = self.rng.random_sample(n)
        for t in range(n):
            own = int(self.label[t])
            count[own] -= 1
            empty = fresh[t].copy()
            if count[own] == 0:  # a component that only this row holds is the first empty one on offer
                empty[0] = known[t, own]
            with np.errstate(divide="ignore"):
                both = np.concatenate([np.log(count) + known[t], np.log(self.concentration / m) + empty])
            share = softmax_rows(both[None])[1][0]
            chosen = min(int((share.cumsum() < lot[t]).sum()), len(share) - 1)
            if chosen >= len(count):
                which = chosen - len(count)
                if count[own] == 0 and which == 0:
                    chosen = own
                else:
                    made = offered.pick(slice(t * m + which, t * m + which + 1))
                    self.components = self.components.join(made)
                    known = np.hstack([known, self.log_densities(self.x, self.target, made)])
                    count = np.append(count, 0.0)
                    chosen = len(count) - 1
            self.label[t] = chosen
            count[chosen] += 1
        alive = np.flatnonzero(count > 0)
        self.components = self.components.pick(alive)
        self.label = np.searchsorted(alive, self.label)

    def _component_step(self, j: int) -> None:
        inside = self.label == j
        x, target = self.x[inside], self.target[inside]
        mean, spread, coef = (value[j].copy() for value in self.components)
        precision = len(x) * np.exp(-spread) + 1.0  # the prior of a mean is standard normal
        mean = x.sum(0) * np.exp(-spread) / precision + self.rng.standard_normal(len(mean)) / np.sqrt(precision)
        square = ((x - mean) ** 2).sum(0)
        for k in range(len(spread)):
            density = _log_variance_density(float(square[k]), len(x), _SPREAD_MEAN, _SPREAD_STD)
            spread[k] = slice_sample(density, float(spread[k]), 1.0, self.rng)
        self._coef_step(np.column_stack([np.ones(len(x)), x]), target, coef)
        for value, new in zip(self.components, (mean, spread, coef), strict=True):
            value[j] = new

    def _coef_step(self, z: Array, target: Array, coef: Array) -> None:
        """Slice sampling of one coefficient after another, in place."""
        logits = z @ coef.T
        own = np.arange(len(z))
        for c in range(len(coef)):
            others = np.delete(logits, c, axis=1)
            top = others.max(1)
            rest = top + np.log(np.exp(others - top[:, None]).sum(1))  # [rows]
            hit = target == c
            for k in range(z.shape[1]):
                base = logits[:, c] - coef[c, k] * z[:, k]
                variance = self.scales[0] if k == 0 else self.scales[1]
                density = _coef_density(base, z[:, k], rest, hit, float(variance))
                coef[c, k] = slice_sample(density, float(coef[c, k]), 2.0, self.rng)
                logits[own, c] = base + coef[c, k] * z[:, k]

    def _scale_step(self) -> None:
        parts = self.components.coef[:, :, 0], self.components.coef[:, :, 1:]
        for k, part in enumerate(parts):
            density = _log_variance_density(float((part**2).sum()), part.size, *_SCALES)
            self.scales[k] = np.exp(slice_sample(density, float(np.log(self.scales[k])), 1.0, self.rng))

    def _concentration_density(self, log_gamma: float) -> float:
        prior = _log_normal_prior(log_gamma, *_CONCENTRATION)
        power = len(self.components.mean) * log_gamma
        return prior + power + log_concentration_density(log_gamma, len(self.x))


def _log_normal_prior(value: float, mean: float, deviation: float) -> float:
    return -0.5 * ((value - mean) / deviation) ** 2


def _log_variance_density(square: float, count: int, mean: float, deviation: float) -> Callable[[float], float]:
    """Of the log variance of `count` normal numbers with the given sum of squares, under a normal prior."""

    def density(value: float) -> float:
        if abs(value) > 30:
            return -np.inf
        return -0.5 * (count * value + square * float(np.exp(-value))) + _log_normal_prior(value, mean, deviation)

    return density


def _coef_density(base: Array, z: Array, rest: Array, hit: Array, variance: float) -> Callable[[float], float]:
    def density(value: float) -> float:
        logit = base + value * z
        return float((np.where(hit, logit, 0.0) - np.logaddexp(logit, rest)).sum() - 0.5 * value * value / variance)

    return density
