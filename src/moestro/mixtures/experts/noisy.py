"""A uniform expert beside others, that takes the rows which nobody explains (Murphy & Murphy 2020)."""

from __future__ import annotations

from typing import Any

import numpy as np

from moestro.mixtures.experts.base import Expert
from moestro.mixtures.gates.base import Effort, Params
from moestro.mixtures.numerics import Array
from moestro.mixtures.rows import Rows, Scaling


class NoisyExpert(Expert):
    """Experts of another kind, the last of them replaced by a uniform density over the range of the targets.

        p(y|x) = g_E(x) / V + sum_{i<E} g_i(x) f_i(y|x)    Murphy & Murphy 2020 (gated noise)

    Under a constant gate the noise has the same share everywhere (their non-gated noise). V is the volume of the
    box that holds the fitted targets; outside it the density is 0.

    Args:
        expert: the kind of the other experts; None takes linear ones with independent errors.

    Parameters: those of the other experts with a leading "own:" in front of their names, `low`, `high` `[outputs]`.
    """

    multi_output = True
    smooth = False  # an edge at the border of the box
    parametric = False

    def __init__(self, expert: Expert | None = None):
        self.expert = expert

    @property
    def _other(self) -> Expert:
        from moestro.mixtures.experts.gaussian import GaussianExpert

        return GaussianExpert("diag") if self.expert is None else self.expert

    @staticmethod
    def _own(params: Params) -> Params:
        return {name[4:]: value for name, value in params.items() if name.startswith("own:")}

    def design(self, x: Array) -> Array:
        return self._other.design(x)

    def m_step(self, rows: Rows, mass: Array, params: Params | None, effort: Effort) -> Params:
        if self._other.target != "real" or mass.shape[1] < 2:
            raise ValueError(
                f"NoisyExpert({self.expert!r}) with {mass.shape[1]} experts; pass experts of real targets and "
                "n_experts=2 or more, the last is the noise"
            )
        before = None if params is None else self._own(params)
        inner = self._other.m_step(rows, mass[:, :-1], before, effort)
        low, high = rows.y.min(0), rows.y.max(0)
        flat = high - low < np.sqrt(rows.floor)
        box = {"low": np.where(flat, low - 0.5, low), "high": np.where(flat, high + 0.5, high)}
        return {**{f"own:{name}": value for name, value in inner.items()}, **box}

    def log_prob(self, params: Params, z: Array, y: Array) -> Array:
        low, high = params["low"], params["high"]
        slack = 1e-9 * (high - low)
        inside = ((y >= low - slack) & (y <= high + slack)).all(1)
        noise = np.where(inside, -np.log(high - low).sum(), -np.inf)
        return np.column_stack([self._other.log_prob(self._own(params), z, y), noise])

    def _with(self, params: Params, z: Array, others: Array, noise: Array) -> Array:
        return np.concatenate([others, np.broadcast_to(noise, (len(z), 1, len(params["low"])))], axis=1)

    def mean(self, params: Params, z: Array) -> Array:
        middle = 0.5 * (params["low"] + params["high"])
        return self._with(params, z, self._other.mean(self._own(params), z), middle)

    def variance(self, params: Params, z: Array) -> Array:
        spread = (params["high"] - params["low"]) ** 2 / 12
        return self._with(params, z, self._other.variance(self._own(params), z), spread)

    def cdf(self, params: Params, z: Array, y: Array) -> Array:
        share = np.clip((y - params["low"]) / (params["high"] - params["low"]), 0.0, 1.0)
        return np.concatenate([self._other.cdf(self._own(params), z, y), share[:, None]], axis=1)

    def sample(self, params: Params, z: Array, label: Array, rng: np.random.RandomState) -> Array:
        noise = label == len(self._own(params)["coef"])
        drawn = self._other.sample(self._own(params), z, np.where(noise, 0, label), rng)
        uniform = rng.uniform(params["low"], params["high"], drawn.shape)
        return np.where(noise[:, None], uniform, drawn)

    def penalty(self, params: Params, rows: Rows) -> float:
        return self._other.penalty(self._own(params), rows)

    def count(self, params: Params) -> int | None:
        return self._other.count(self._own(params))

    def attributes(self, params: Params, scaling: Scaling) -> dict[str, Any]:
        found = self._other.attributes(self._own(params), scaling)
        box = np.stack([params["low"], params["high"]]) * scaling.y_scale + scaling.y_center
        return {**found, "noise_range_": box}

    def permute(self, params: Params, order: Array) -> Params:
        num = len(order) - 1
        if order[-1] != num:
            raise ValueError("The noise is the last expert and stays there; renumber the others only")
        own = self._other.permute(self._own(params), order[:-1])
        return {
            **{f"own:{name}": value for name, value in own.items()},
            "low": params["low"],
            "high": params["high"],
        }
