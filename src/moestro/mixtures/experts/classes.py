"""Logistic experts for two and more classes: Jordan & Jacobs 1994; Chen, Xu & Chi 1999."""

from __future__ import annotations

from typing import Any

import numpy as np

from moestro.mixtures import logit
from moestro.mixtures.experts.base import Expert, keep_empty, ridge
from moestro.mixtures.gates.base import Effort, Params
from moestro.mixtures.numerics import Array, draw_labels, is_empty
from moestro.mixtures.rows import Rows, Scaling


class MultinomialExpert(Expert):
    """Multinomial logits: `P_i(c|x) = softmax_c(w_icᵀ[1, x])` with the last class at 0.

    Fitted by Newton steps with the full Hessian over all classes (Chen, Xu & Chi 1999).

    Args:
        alpha: ridge `½ α |w|²` in the units of the data, as `C = 1/α` of `sklearn.linear_model.LogisticRegression`;
            None takes 1e-4 of the sample weight per expert on standardised inputs, because inside a region the
            classes are often separable and the best slopes infinite.

    Parameters: `coef` `[experts, classes - 1, p]`.
    """

    target = "class"

    def __init__(self, alpha: float | None = None):
        self.alpha = alpha

    def _prior(self, rows: Rows, num_experts: int) -> tuple[Array, Array]:
        classes = rows.y.shape[1]
        couple = np.eye(1) if classes == 2 else logit.coupling(classes)
        if self.alpha is not None:
            return couple, ridge(rows, self.alpha)
        weights = np.full(rows.z.shape[1], 1e-4 * rows.total / num_experts)
        weights[0] = 0.0
        return couple, weights

    def m_step(self, rows: Rows, mass: Array, params: Params | None, effort: Effort) -> Params:
        num_experts, classes = mass.shape[1], rows.y.shape[1]
        couple, weights = self._prior(rows, num_experts)
        blank = np.zeros((num_experts, classes - 1, rows.z.shape[1]))
        coef = blank if params is None else params["coef"]
        fitted = [
            logit.fit_logit(
                rows.z, rows.y, mass[:, i], coef[i], couple, weights, effort.steps, effort.solver, effort.enough
            )
            for i in range(num_experts)
        ]
        return keep_empty({"coef": np.stack(fitted)}, params, is_empty(mass.sum(0), rows.total))

    def log_prob(self, params: Params, z: Array, y: Array) -> Array:
        return np.stack([(y * logit.log_softmax(z, coef)).sum(1) for coef in params["coef"]], axis=1)

    def mean(self, params: Params, z: Array) -> Array:
        return np.stack([logit.class_shares(z, coef) for coef in params["coef"]], axis=1)

    def variance(self, params: Params, z: Array) -> Array:
        share = self.mean(params, z)
        return share * (1 - share)

    def cdf(self, params: Params, z: Array, y: Array) -> Array:
        raise NotImplementedError("Classes have no order")

    def sample(self, params: Params, z: Array, label: Array, rng: np.random.RandomState) -> Array:
        share = self.mean(params, z)[np.arange(len(z)), label]
        return np.eye(share.shape[1])[draw_labels(share, rng)]

    def penalty(self, params: Params, rows: Rows) -> float:
        couple, weights = self._prior(rows, len(params["coef"]))
        return sum(logit.penalty_value(coef, couple, weights) for coef in params["coef"])

    def count(self, params: Params) -> int:
        return int(params["coef"].size)

    def attributes(self, params: Params, scaling: Scaling) -> dict[str, Any]:
        num, free, p = params["coef"].shape
        wide = np.zeros((num, free + 1, 1 + len(scaling.x_center)))
        wide[:, :-1, :p] = params["coef"]
        intercept, slope = scaling.plane(wide)
        return {"expert_coef_": slope, "expert_intercept_": intercept}

    def free(self, params: Params) -> Array:
        return params["coef"].ravel()

    def restore(self, numbers: Array, like: Params) -> Params:
        return {"coef": numbers.reshape(like["coef"].shape)}

    def gradient(self, rows: Rows, mass: Array, params: Params) -> Array:
        couple, weights = self._prior(rows, mass.shape[1])
        share = self.mean(params, rows.z)
        out = []
        for i, coef in enumerate(params["coef"]):
            gap = mass[:, i, None] * (rows.y - share[:, i])[:, :-1]
            out.append(gap.T @ rows.z - couple @ coef * weights)
        return np.concatenate([slope.ravel() for slope in out])


class LogisticExpert(MultinomialExpert):
    """Two classes: `P_i(second class | x) = σ(β_iᵀ[1, x])`.

    Args:
        alpha: as for `MultinomialExpert`.
    """

    def attributes(self, params: Params, scaling: Scaling) -> dict[str, Any]:
        found = super().attributes(params, scaling)
        return {name: -value[:, :1] for name, value in found.items()}  # the logit of the second class


class ConstantClassExpert(MultinomialExpert):
    """Experts whose class probabilities ignore the inputs."""

    def __init__(self) -> None:
        super().__init__()

    def design(self, x: Array) -> Array:
        return np.ones((len(x), 1))
