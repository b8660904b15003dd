"""The hierarchical mixture learned row by row (Jordan & Jacobs 1994, section 5)."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight, validate_data

from moestro.mixtures.base import MixtureOfExperts
from moestro.mixtures.classifier import MixtureOfExpertsClassifier
from moestro.mixtures.experts import Expert, GaussianExpert, MultinomialExpert
from moestro.mixtures.gates import SoftmaxGate
from moestro.mixtures.leaves import Leaves, LinearLeaves, LogitLeaves
from moestro.mixtures.mixture import Mixture
from moestro.mixtures.numerics import Array, softmax_rows
from moestro.mixtures.regressor import MixtureOfExpertsRegressor
from moestro.mixtures.rows import Scaling, Sides, merge_repeats, with_intercept


class OnlineMixture(MixtureOfExperts):
    """What the on-line estimators share: passes over rows, the tree of gates, and leaves that learn from a row."""

    _leaf: type[Leaves]

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

    def _leaf_expert(self) -> Expert:
        """The expert whose parameters the leaves learn."""
        raise NotImplementedError

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Start anew and pass over the rows, in an order of their own.

        Equal rows are merged and their weights added, and the order in which the rows come does not matter; give
        rows whose order matters to `partial_fit`.

        Args:
            X: inputs `[rows, features]`.
            y: targets `[rows]` or `[rows, outputs]`, or classes `[rows]`.
            sample_weight: how much each row counts beside the others; weight 0 is the same as leaving the row out.
        """
        self._check_options()
        x, y = self._validate(X, y)
        used, weight = self._used(x, sample_weight)
        x, target, weight = merge_repeats(x[used], self._encode(y[used]), weight)
        weight /= weight.mean()  # or all noise of heavy rows would be that of the last one
        self._begin(x, target, weight)
        for _ in range(self.n_passes):
            self._learn(x, target, weight)
        self.n_iter_ = self.n_passes
        return self

    @staticmethod
    def _used(x: Array, sample_weight: Any) -> tuple[Array, Array]:
        """Which rows have a weight, and the weights of those."""
        weight = _check_sample_weight(sample_weight, x, dtype=np.float64, ensure_non_negative=True)
        used = weight > 0
        return used, weight[used]

    def _check_options(self) -> None:
        if self.n_passes < 1 or not 0 < self.forgetting <= 1 or self.prior <= 0:
            raise ValueError(
                f"n_passes={self.n_passes} must be at least 1, forgetting={self.forgetting} in (0, 1] and "
                f"prior={self.prior} above 0"
            )

    def _begin(self, x: Array, y: Array, weight: Array) -> None:
        _, _, branching = self._parts()
        rng = check_random_state(self.random_state)
        expert = self._leaf_expert()
        num, width = int(np.prod(branching)), x.shape[1] + 1
        columns = y.shape[1] - (expert.target == "class")  # the last class has logit 0
        self.scaling_ = Scaling.of(x, y, weight, expert.target == "real")
        self._sides = Sides.of(self.scaling_)
        nodes = np.cumprod((1, *branching))
        gate = [0.1 * rng.standard_normal((nodes[i], b - 1, width)) for i, b in enumerate(branching)]
        self._leaves = self._leaf(0.5 * rng.standard_normal((num, width, columns)), self.prior, self.forgetting)
        self.mixture_ = Mixture(SoftmaxGate(), expert, {"coef": gate}, self._leaves.params())
        self.n_seen_ = 0
        self._fitted_shape = (num, y.shape[1], x.shape[1])

    def _take(self, first: bool, x: Array, y: Array, sample_weight: Any) -> None:
        """Rows of one call, as they come."""
        used, weight = self._used(x, sample_weight)
        x, y = x[used], y[used]
        if first:
            self._begin(x, y, weight)
            self.n_iter_ = 1
        self._learn(x, y, weight)

    def _learn(self, x: Array, y: Array, weight: Array) -> None:
        rows = with_intercept(self.scaling_.x(x))
        targets = self.scaling_.y(y) if self.mixture_.expert.target == "real" else y
        gate = [level.copy() for level in self.mixture_.gate_params["coef"]]
        leaves = self._leaves.copy()
        share = np.zeros(len(leaves.coef))
        for row, target, each in zip(rows, targets, weight, strict=True):
            share += each * _update(row, target, each, gate, leaves, self.n_seen_)
            self.n_seen_ += 1
        self._leaves = leaves
        self.mixture_ = Mixture(self.mixture_.gate, self.mixture_.expert, {"coef": gate}, leaves.params())
        self.weights_ = share / weight.sum()  # mean gate probability while the rows went by
        self.n_parameters_ = self.mixture_.count()
        self._describe()


def _update(row: Array, target: Array, weight: float, gate: list[Array], leaves: Leaves, seen: int) -> Array:
    """One row into gates and leaves, in place; returns the gate probabilities `[experts]` before it.

    A row of weight w moves the gate as far as w small steps towards the same end would: `1 - (1 - η)^w` for η.
    """
    children, log_leaf = [], np.zeros(1)
    for level in gate:
        logits = np.zeros((len(level), level.shape[1] + 1))
        logits[:, :-1] = level @ row
        children.append(softmax_rows(logits)[1])
        log_leaf = (log_leaf[:, None] + np.log(np.maximum(children[-1], 1e-300))).ravel()
    share = softmax_rows((log_leaf + leaves.log_prob(row, target))[None])[1][0]
    rate = 1 - (1 - 2.5 / (50 + seen / 20)) ** weight
    for level, prior in zip(gate, children, strict=True):
        mass = share.reshape(*prior.shape, -1).sum(2)
        level += rate * (mass - mass.sum(1, keepdims=True) * prior)[:, :-1, None] * row
    leaves.learn(row, target, share, weight, seen)
    return np.exp(log_leaf)


class OnlineMixtureOfExpertsRegressor(OnlineMixture, MixtureOfExpertsRegressor):
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

    Attributes: as `MixtureOfExpertsRegressor` has for linear experts; `n_seen_` counts rows,
    equal ones of `fit` once.
    """

    _leaf = LinearLeaves

    def _leaf_expert(self) -> Expert:
        return GaussianExpert("diag")

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Learn from more rows, in their order; the first call starts the mixture and sets the units."""
        first = not hasattr(self, "mixture_")
        if first:
            self._check_options()
            x, y = self._validate(X, y)
            y = self._encode(y)
        else:
            x, y = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True, reset=False)
            y = self._known(y)
        self._take(first, x, y, sample_weight)
        return self


class OnlineMixtureOfExpertsClassifier(OnlineMixture, MixtureOfExpertsClassifier):
    """Multinomial experts under a softmax gate or a tree of them, updated with every single row.

        leaf:  R_c ← (R_c - w R_c z zᵀ R_c / (λ + w zᵀR_c z)) / λ,    w = h p_c (1 - p_c)
               β_c ← β_c + h R_c z (y_c - p_c)
        gate:  v_c ← v_c + η_t W (h_c - g_c) u,    η_t = 2.5 / (50 + t / 20)

    The leaves are those of `OnlineMixtureOfExpertsRegressor` with the working weights of a logit in place of 1:
    Newton's method on one row after another. Inputs are standardised by the first rows seen: all of `fit`, or the
    first call of `partial_fit`.

    Args:
        n_experts, branching, n_passes, forgetting, prior, random_state: as for `OnlineMixtureOfExpertsRegressor`.

    Attributes: as `MixtureOfExpertsClassifier` has for multinomial experts; `n_seen_` counts rows.
    """

    _leaf = LogitLeaves

    def _leaf_expert(self) -> Expert:
        return MultinomialExpert()

    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> Self:
        """Learn from more rows, in their order; the first call starts the mixture and sets the units.

        Args:
            X: inputs `[rows, features]`.
            y: classes `[rows]`.
            classes: all classes that will ever come, for the first call where its y lacks some.
            sample_weight: how often each row counts.
        """
        first = not hasattr(self, "mixture_")
        if first:
            self._check_options()
            x, y = self._validate(X, y)
            self._encode(y if classes is None else np.asarray(classes))
        else:
            x, y = validate_data(self, X, y, dtype=np.float64, reset=False)
            if classes is not None and not np.array_equal(np.unique(classes), self.classes_):
                raise ValueError(f"classes={list(classes)} but the first call had {self.classes_.tolist()}")
        self._take(first, x, self._known(y), sample_weight)
        return self
