"""Laplace experts: least absolute deviations (Nguyen & McLachlan 2016)."""

from __future__ import annotations

from typing import Any

import numpy as np

from moestro.mixtures.experts.base import Expert, keep_empty, own_rows, planes
from moestro.mixtures.gates.base import Effort, Params
from moestro.mixtures.numerics import Array, is_empty, least_squares, predictions
from moestro.mixtures.rows import Rows, Scaling


class LaplaceExpert(Expert):
    """Heavy-tailed linear experts: `f_i(y|x) = exp(-|y - β_iᵀ[1, x]| / b_i) / 2 b_i`, outputs independent.

    The weighted median regression of the M-step is solved by a few majorise-minimise sweeps with weights
    `h / sqrt(r² + ε²)`; then the exact fit through the p nearest rows is tried, because the best fit passes
    through p rows. A candidate is taken only where the sum of absolute errors falls, so the likelihood never does.

    Args:
        sweeps: majorise-minimise sweeps per M-step.

    Parameters: `coef` `[experts, p, outputs]`, `scale` `[experts, outputs]`.
    """

    multi_output = True
    smooth = False

    def __init__(self, sweeps: int = 3):
        self.sweeps = sweeps

    def m_step(self, rows: Rows, mass: Array, params: Params | None, effort: Effort) -> Params:
        total = mass.sum(0)
        start = least_squares(rows.z, rows.y, mass, np.zeros(rows.z.shape[1])) if params is None else params["coef"]
        coef, scale = np.array(start), np.empty((mass.shape[1], rows.y.shape[1]))
        for output in range(rows.y.shape[1]):
            coef[:, :, output], loss = self._median_fits(rows.z, rows.y[:, output], mass, coef[:, :, output])
            scale[:, output] = np.maximum(loss / np.maximum(total, 1e-300), np.sqrt(rows.floor / 2))
        return keep_empty({"coef": coef, "scale": scale}, params, is_empty(total, rows.total))

    def _median_fits(self, z: Array, y: Array, mass: Array, coef: Array) -> tuple[Array, Array]:
        error, loss = _absolute(z, y, mass, coef)
        for _ in range(self.sweeps):
            small = 1e-6 * loss / np.maximum(mass.sum(0), 1e-300) + 1e-150
            weight = mass / np.sqrt(error**2 + small**2)
            tried = least_squares(z, y[:, None], weight, np.zeros(z.shape[1]))[:, :, 0]
            coef, error, loss = _better(z, y, mass, (coef, error, loss), tried)
        through = coef.copy()
        p = z.shape[1]
        if len(z) > p:
            for i in range(len(coef)):
                reach = np.where(mass[:, i] > 1e-6 * mass[:, i].max(), np.abs(error[:, i]), np.inf)
                near = np.argpartition(reach, p - 1)[:p]
                through[i] = np.linalg.lstsq(z[near], y[near], rcond=None)[0]
            coef, error, loss = _better(z, y, mass, (coef, error, loss), through)
        return coef, loss

    def log_prob(self, params: Params, z: Array, y: Array) -> Array:
        error = np.abs(y[:, None, :] - predictions(z, params["coef"]))
        return (-error / params["scale"] - np.log(2 * params["scale"])).sum(2)

    def mean(self, params: Params, z: Array) -> Array:
        return predictions(z, params["coef"])

    def variance(self, params: Params, z: Array) -> Array:
        return np.broadcast_to(2 * params["scale"] ** 2, (len(z), *params["scale"].shape))

    def cdf(self, params: Params, z: Array, y: Array) -> Array:
        distance = (y[:, None, :] - predictions(z, params["coef"])) / params["scale"]
        tail = 0.5 * np.exp(-np.abs(distance))
        return np.where(distance < 0, tail, 1 - tail)

    def sample(self, params: Params, z: Array, label: Array, rng: np.random.RandomState) -> Array:
        center = own_rows(z, params["coef"], label)
        return center + rng.laplace(size=center.shape) * params["scale"][label]

    def count(self, params: Params) -> int:
        return int(params["coef"].size + params["scale"].size)

    def attributes(self, params: Params, scaling: Scaling) -> dict[str, Any]:
        scale = params["scale"] * scaling.y_scale
        return {**planes(params["coef"], scaling), "expert_scale_": scale, "expert_variance_": 2 * scale**2}

    def free(self, params: Params) -> Array:
        return np.concatenate([params["coef"].ravel(), np.log(params["scale"]).ravel()])

    def restore(self, numbers: Array, like: Params) -> Params:
        coef, scale = np.split(numbers, [like["coef"].size])
        return {"coef": coef.reshape(like["coef"].shape), "scale": np.exp(scale).reshape(like["scale"].shape)}

    def gradient(self, rows: Rows, mass: Array, params: Params) -> Array:
        error = rows.y[:, None, :] - predictions(rows.z, params["coef"])
        pull = mass[:, :, None] * np.sign(error) / params["scale"]
        by_coef = np.einsum("tp,teq->epq", rows.z, pull)
        by_scale = (mass[:, :, None] * (np.abs(error) / params["scale"] - 1)).sum(0)
        return np.concatenate([by_coef.ravel(), by_scale.ravel()])


def _absolute(z: Array, y: Array, mass: Array, coef: Array) -> tuple[Array, Array]:
    error = y[:, None] - z @ coef.T
    return error, np.einsum("te,te->e", mass, np.abs(error))


def _better(
    z: Array, y: Array, mass: Array, now: tuple[Array, Array, Array], tried: Array
) -> tuple[Array, Array, Array]:
    coef, error, loss = now
    new_error, new_loss = _absolute(z, y, mass, tried)
    take = new_loss < loss
    return np.where(take[:, None], tried, coef), np.where(take, new_error, error), np.where(take, new_loss, loss)
