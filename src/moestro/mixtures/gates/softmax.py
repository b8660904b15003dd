"""The softmax gate, flat or a tree of softmaxes: Jacobs et al. 1991, Jordan & Jacobs 1994."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from moestro.mixtures import logit
from moestro.mixtures.gates.base import Effort, Gate, Params
from moestro.mixtures.numerics import Array
from moestro.mixtures.rows import Rows, Scaling

_FIRST_RIDGE = 1e-3  # the labels of a start are crude: do not believe their sharp borders
_FIRST_ROWS = 50_000  # crude labels need no more: a million rows would cost as much as ten iterations
_LEAST_MASS = 1e-12  # a node that has lost a row does not learn from it


class SoftmaxGate(Gate):
    """Probabilities linear in the inputs before a softmax, at every node of a tree.

        g_c|v(x) = softmax_c(v_vcᵀ [1, x]),    leaf probability = product along its path    Jordan & Jacobs 1994

    A flat gate is the tree of depth one. Each node is fitted by Newton steps on its own posterior shares, rows
    weighted by the mass that reaches the node. The start looks at 50,000 evenly spaced rows at most.

    Args:
        alpha: ridge on the standardised slopes, per unit of sample weight: when regions are separable the best
            slopes are infinite and the ridge keeps them finite.

    Parameters: `coef`, one array `[nodes, children - 1, 1 + features]` per level; the last child has logit 0.
    """

    hierarchical = True

    def __init__(self, alpha: float = 1e-6):
        self.alpha = alpha

    def start(self, rows: Rows, share: Array, branching: tuple[int, ...], effort: Effort) -> Params:
        nodes = np.cumprod((1, *branching))
        blank = [np.zeros((nodes[i], b - 1, rows.u.shape[1])) for i, b in enumerate(branching)]
        some = slice(None, None, -(-len(share) // _FIRST_ROWS))
        few = replace(rows, u=rows.u[some], z=rows.z[some], y=rows.y[some], weight=rows.weight[some])
        return self._fit(few, share[some], {"coef": blank}, effort, max(self.alpha, _FIRST_RIDGE))

    def m_step(self, rows: Rows, share: Array, params: Params, effort: Effort) -> Params:
        return self._fit(rows, share, params, effort, self.alpha)

    def _fit(self, rows: Rows, share: Array, params: Params, effort: Effort, alpha: float) -> Params:
        ridge = self._ridge(rows, alpha)
        levels = []
        for coef, target, mass in zip(params["coef"], *self._by_node(share, params), strict=True):
            couple = logit.coupling(coef.shape[1] + 1)
            fitted = coef.copy()
            for node in range(len(coef)):
                used = mass[:, node] > _LEAST_MASS
                everything = bool(used.all())
                u = rows.u if everything else rows.u[used]
                reach = mass[:, node] * rows.weight
                reach = reach if everything else reach[used]
                if reach.sum() < 1e-8 * rows.total:
                    continue  # an empty node keeps its gate
                wanted = target[:, node] if everything else target[used, node]
                fitted[node] = logit.fit_logit(
                    u, wanted, reach, coef[node], couple, ridge, effort.steps, effort.solver, effort.enough
                )
            levels.append(fitted)
        return {"coef": levels}

    def _ridge(self, rows: Rows, alpha: float) -> Array:
        ridge = np.full(rows.u.shape[1], alpha * rows.total)
        ridge[0] = 0.0
        return ridge

    @staticmethod
    def _by_node(share: Array, params: Params) -> tuple[list[Array], list[Array]]:
        """Per level, the children's shares `[rows, nodes, children]` and node masses `[rows, nodes]`."""
        targets, masses = [], []
        for coef in params["coef"]:
            child = share.reshape(len(share), len(coef), coef.shape[1] + 1, -1).sum(3)
            mass = child.sum(2)
            masses.append(mass)
            targets.append(child / np.maximum(mass, _LEAST_MASS)[:, :, None])
        return targets, masses

    def node_log_proba(self, params: Params, u: Array) -> list[Array]:
        """Per level, `log g_c|v(x)` as `[rows, nodes, children]`."""
        levels = []
        for coef in params["coef"]:
            levels.append(np.stack([logit.log_softmax(u, node) for node in coef], axis=1))
        return levels

    def log_weight(self, params: Params, u: Array) -> Array:
        levels = self.node_log_proba(params, u)
        leaves = levels[0].reshape(len(u), -1)
        for level in levels[1:]:
            leaves = (leaves[:, :, None] + level).reshape(len(u), -1)
        return leaves

    def penalty(self, params: Params, rows: Rows) -> float:
        ridge = self._ridge(rows, self.alpha)
        return sum(
            logit.penalty_value(node, logit.coupling(len(node) + 1), ridge)
            for coef in params["coef"]
            for node in coef
            if node.size
        )

    def prior_slope(self, coef: Array, rows: Rows) -> Array:
        """Derivative of the penalty in the coefficients of one node, `[children - 1, features]`."""
        return logit.coupling(len(coef) + 1) @ coef * self._ridge(rows, self.alpha)

    def count(self, params: Params) -> int:
        return sum(coef.size for coef in params["coef"])

    def attributes(self, params: Params, scaling: Scaling) -> dict[str, Any]:
        intercepts, slopes = [], []
        for coef in params["coef"]:
            last = np.zeros((len(coef), 1, coef.shape[2]))
            intercept, slope = scaling.plane(np.concatenate([coef, last], axis=1))
            intercepts.append(intercept)
            slopes.append(slope)
        if len(slopes) == 1:
            return {"gate_coef_": slopes[0][0], "gate_intercept_": intercepts[0][0]}
        return {"node_coef_": slopes, "node_intercept_": intercepts}

    def free(self, params: Params) -> Array:
        return np.concatenate([coef.ravel() for coef in params["coef"]])

    def restore(self, numbers: Array, like: Params) -> Params:
        cuts = np.cumsum([coef.size for coef in like["coef"]])[:-1]
        parts = np.split(numbers, cuts)
        return {"coef": [part.reshape(c.shape) for part, c in zip(parts, like["coef"], strict=True)]}

    def gradient(self, rows: Rows, share: Array, params: Params) -> Array:
        probs = self.node_log_proba(params, rows.u)
        slopes = []
        targets, masses = self._by_node(share, params)
        for coef, target, mass, log_p in zip(params["coef"], targets, masses, probs, strict=True):
            for node in range(len(coef)):
                reach = (mass[:, node] * rows.weight)[:, None]
                gap = reach * (target[:, node, :-1] - np.exp(log_p[:, node, :-1]))
                slopes.append((gap.T @ rows.u - self.prior_slope(coef[node], rows)).ravel())
        return np.concatenate(slopes)

    def permute(self, params: Params, order: Array) -> Params:
        if len(params["coef"]) > 1:
            raise ValueError("The leaves of a tree have their places; only a flat gate can be renumbered")
        coef = params["coef"][0][0]
        full = np.vstack([coef, np.zeros((1, coef.shape[1]))])[order]
        return {"coef": [(full[:-1] - full[-1])[None]]}
