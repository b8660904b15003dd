"""The hierarchical mixture learned row by row (Jordan & Jacobs 1994, section 5)."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from sklearn.utils import check_random_state
from sklearn.utils.validation import validate_data

from moestro.mixtures.experts import GaussianExpert
from moestro.mixtures.gates import SoftmaxGate
from moestro.mixtures.mixture import Mixture
from moestro.mixtures.numerics import Array, softmax_rows
from moestro.mixtures.regressor import MixtureOfExpertsRegressor
from moestro.mixtures.rows import Scaling, with_intercept


class OnlineMixtureOfExpertsRegressor(MixtureOfExpertsRegressor):
    """Linear experts under a softmax gate or a tree of them, updated with every single row.

        leaf:  R ← (R - h R z zᵀ R / (λ + h zᵀR z)) / λ,   B ← B + h R z (y - Bᵀz)ᵀ
        gate:  v_c ← v_c + η_t W (h_c - g_c) u,            η_t = 2.5 / (50 + t / 20)
        noise: σ² ← σ² + 0.01 h ((y - Bᵀz)² - σ²)

    The leaves follow the paper (recursive least squares with forgetting λ that rises to 1). Its rule for the gate,
    least squares of log posteriors, saturates; ours is the stochastic gradient of the likelihood. Inputs and
    targets are standardised by the first rows seen: all of `fit`, or the first call of `partial_fit`.

    Args:
        n_experts: number of experts of a flat mixture; None means 2, or the leaves of `branching`.
        branching: children per node for every level of a tree.
        n_passes: passes of `fit` over the rows.
        forgetting: λ of the first row; 1 never forgets.
        prior: R of the first row over the identity, the inverse of a ridge.
        random_state: seed of the first coefficients.

    Attributes: as `MixtureOfExpertsRegressor` has for linear experts; `n_seen_` counts rows.
    """

    def __init__(
        self,
        n_experts: int | None = None,
        *,
        branching: tuple[int, ...] | None = None,
        n_passes: int = 5,
        forgetting: float = 0.99,
        prior: float = 10.0,
        random_state: Any = None,
    ):
        super().__init__(n_experts, branching=branching, random_state=random_state)
        self.n_passes = n_passes
        self.forgetting = forgetting
        self.prior = prior

    def fit(self, X: Any, y: Any) -> Self:  # type: ignore[override]
        """Start anew and pass over the rows in their order.

        Args:
            X: inputs `[rows, features]`.
            y: targets `[rows]` or `[rows, outputs]`.
        """
        if self.n_passes < 1 or not 0 < self.forgetting <= 1 or self.prior <= 0:
            raise ValueError(
                f"n_passes={self.n_passes} must be at least 1, forgetting={self.forgetting} in (0, 1] and "
                f"prior={self.prior} above 0"
            )
        x, y = self._validate(X, y)
        target = self._encode(y)
        self._begin(x, target)
        for _ in range(self.n_passes):
            self._learn(x, target)
        self.n_iter_ = self.n_passes
        return self

    def partial_fit(self, X: Any, y: Any) -> Self:
        """Learn from more rows; the first call starts the mixture and sets the units."""
        if not hasattr(self, "mixture_"):
            x, y = self._validate(X, y)
            target = self._encode(y)
            self._begin(x, target)
            self.n_iter_ = 1
        else:
            x, y = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True, reset=False)
            target = self._known(y)
        self._learn(x, target)
        return self

    def _begin(self, x: Array, y: Array) -> None:
        _, _, branching = self._parts()
        rng = check_random_state(self.random_state)
        num, width, outputs = int(np.prod(branching)), x.shape[1] + 1, y.shape[1]
        self.scaling_ = Scaling.of(x, y, np.ones(len(x)), True)
        nodes = np.cumprod((1, *branching))
        gate = [0.1 * rng.standard_normal((nodes[i], b - 1, width)) for i, b in enumerate(branching)]
        coef = 0.5 * rng.standard_normal((num, width, outputs))
        variance = np.tile(np.eye(outputs), (num, 1, 1))
        self.mixture_ = Mixture(
            SoftmaxGate(), GaussianExpert("diag"), {"coef": gate}, {"coef": coef, "covariance": variance}
        )
        self._spread = np.tile(self.prior * np.eye(width), (num, 1, 1))
        self.n_seen_ = 0
        self._fitted_shape = (num, outputs, x.shape[1])

    def _learn(self, x: Array, y: Array) -> None:
        rows, targets = with_intercept(self.scaling_.x(x)), self.scaling_.y(y)
        gate = [level.copy() for level in self.mixture_.gate_params["coef"]]
        coef = self.mixture_.expert_params["coef"].copy()
        variance = np.einsum("eqq->eq", self.mixture_.expert_params["covariance"]).copy()
        spread = self._spread.copy()
        weight = np.zeros(len(coef))
        for row, target in zip(rows, targets, strict=True):
            weight += _update(row, target, gate, coef, variance, spread, self.n_seen_, self.forgetting)
            self.n_seen_ += 1
        self._spread = spread
        covariance = variance[:, :, None] * np.eye(y.shape[1])
        self.mixture_ = Mixture(
            self.mixture_.gate, self.mixture_.expert, {"coef": gate}, {"coef": coef, "covariance": covariance}
        )
        self.weights_ = weight / len(rows)  # mean gate probability while the rows went by
        self.n_parameters_ = self.mixture_.count()
        self._describe()


def _update(
    row: Array,
    target: Array,
    gate: list[Array],
    coef: Array,
    variance: Array,
    spread: Array,
    seen: int,
    forgetting: float,
) -> Array:
    """One row into the arrays, in place; returns the gate probabilities `[experts]` before it."""
    error = target - np.einsum("p,epq->eq", row, coef)
    log_f = -0.5 * (error**2 / variance + np.log(variance)).sum(1)
    children, log_leaf = [], np.zeros(1)
    for level in gate:
        logits = np.zeros((len(level), level.shape[1] + 1))
        logits[:, :-1] = level @ row
        children.append(softmax_rows(logits)[1])
        log_leaf = (log_leaf[:, None] + np.log(np.maximum(children[-1], 1e-300))).ravel()
    share = softmax_rows((log_leaf + log_f)[None])[1][0]
    rate = 2.5 / (50 + seen / 20)
    for level, prior in zip(gate, children, strict=True):
        mass = share.reshape(*prior.shape, -1).sum(2)
        level += rate * (mass - mass.sum(1, keepdims=True) * prior)[:, :-1, None] * row
    keep = 1 - (1 - forgetting) * 0.999**seen
    direction = spread @ row  # [experts, p]
    gain = share / (keep + share * (direction @ row))
    spread -= gain[:, None, None] * direction[:, :, None] * direction[:, None, :]
    spread /= keep
    coef += share[:, None, None] * (spread @ row)[:, :, None] * error[:, None, :]
    variance += 0.01 * share[:, None] * (error**2 - variance)
    np.maximum(variance, 1e-6, out=variance)
    if seen % 100 == 99:
        spread[:] = 0.5 * (spread + spread.transpose(0, 2, 1))
    return np.exp(log_leaf)
