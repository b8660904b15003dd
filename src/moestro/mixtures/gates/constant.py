"""The constant gate: mixing proportions that ignore the inputs."""

from __future__ import annotations

from typing import Any

import numpy as np

from moestro.mixtures.gates.base import Effort, Gate, Params
from moestro.mixtures.numerics import Array
from moestro.mixtures.rows import Rows, Scaling


class ConstantGate(Gate):
    """The same probabilities for every row: mixtures of regressions and plain mixtures.

        g_i = sum_t w_t h_ti / sum_t w_t

    Args:
        equal: fix all probabilities at one over the number of experts.

    Parameters: `log_weight` `[experts]`.
    """

    def __init__(self, equal: bool = False):
        self.equal = equal

    def start(self, rows: Rows, share: Array, branching: tuple[int, ...], effort: Effort) -> Params:
        return self.m_step(rows, share, {}, effort)

    def m_step(self, rows: Rows, share: Array, params: Params, effort: Effort) -> Params:
        num_experts = share.shape[1]
        if self.equal:
            return {"log_weight": np.full(num_experts, -np.log(num_experts))}
        mass = rows.weight @ share
        return {"log_weight": np.log(np.maximum(mass / mass.sum(), 1e-300))}

    def log_weight(self, params: Params, u: Array) -> Array:
        return np.tile(params["log_weight"], (len(u), 1))

    def count(self, params: Params) -> int:
        return 0 if self.equal else len(params["log_weight"]) - 1

    def attributes(self, params: Params, scaling: Scaling) -> dict[str, Any]:
        return {}

    def free(self, params: Params) -> Array:
        if self.equal:
            return np.empty(0)
        return params["log_weight"][:-1] - params["log_weight"][-1]

    def restore(self, numbers: Array, like: Params) -> Params:
        if self.equal:
            return like
        logits = np.append(numbers, 0.0)
        return {"log_weight": logits - np.logaddexp.reduce(logits)}

    def gradient(self, rows: Rows, share: Array, params: Params) -> Array:
        if self.equal:
            return np.empty(0)
        return (rows.weight @ share - rows.total * np.exp(params["log_weight"]))[:-1]

    def permute(self, params: Params, order: Array) -> Params:
        return {"log_weight": params["log_weight"][order]}
