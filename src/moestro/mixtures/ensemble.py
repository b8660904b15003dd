"""Gated ensembles: any scikit-learn estimators as experts, weighted by a trained softmax gate."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from joblib import Parallel, delayed
from scipy.optimize import minimize
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, clone
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    _check_sample_weight,
    check_consistent_length,
    check_is_fitted,
    column_or_1d,
    has_fit_parameter,
    validate_data,
)

from moestro.mixtures.answers import class_probabilities
from moestro.mixtures.losses import LOSSES
from moestro.mixtures.numerics import Array, softmax_rows, weighted_moments
from moestro.mixtures.rows import merge_repeats, with_intercept

TRAINING = ("reassign", "em")


class GatedEnsemble(BaseEstimator):
    """Base of `GatedEnsembleRegressor` and `GatedEnsembleClassifier`.

        f(x) = sum_i g_i(x) o_i(x),   g = softmax(V [1, x])

    The experts stay fixed while the gate is trained on all rows, by one of the losses of Jacobs et al. 1991.

    - With `groups` in `fit`, expert i is trained on the rows of group i alone (Meta-Pi, Hampshire & Waibel 1989).
    - "reassign": rows start in random parts; after each round every row goes to the expert that the gate prefers
      for it and that has room, then the experts are trained anew (Collobert, Bengio & Bengio 2002).
    - "em": rows are weighted by `h_i ∝ g_i exp(-½ |d - o_i|² / s²)`, which needs experts that take sample weights.

    Rounds stop when the training loss no longer falls; the best round is kept.
    """

    def __init__(
        self,
        estimator: Any = None,
        n_experts: int = 4,
        *,
        training: str = "reassign",
        loss: str = "blend",
        max_rounds: int = 5,
        capacity_slack: int = 1,
        alpha: float = 1e-4,
        random_state: Any = None,
        n_jobs: int | None = None,
    ):
        self.estimator = estimator
        self.n_experts = n_experts
        self.training = training
        self.loss = loss
        self.max_rounds = max_rounds
        self.capacity_slack = capacity_slack
        self.alpha = alpha
        self.random_state = random_state
        self.n_jobs = n_jobs

    def _base(self) -> Any:
        raise NotImplementedError

    def _read(self, X: Any, y: Any) -> tuple[Array, Array]:
        """Inputs, and targets as a matrix for the gate."""
        raise NotImplementedError

    def _plain(self, target: Array) -> Array:
        """Targets as the experts want them."""
        raise NotImplementedError

    def _output(self, expert: Any, x: Array) -> Array:
        """An expert's answers as a matrix `[rows, q]`."""
        raise NotImplementedError

    def fit(self, X: Any, y: Any, groups: Any = None, sample_weight: Any = None) -> Self:
        """Train experts and gate.

        Args:
            X: inputs `[rows, features]`.
            y: targets.
            groups: the source of every row; expert i then belongs to the i-th source in sorted order.
            sample_weight: how much every row counts, passed to experts that take weights.
        """
        x, target = self._read(X, y)
        weight = _check_sample_weight(sample_weight, x, dtype=np.float64, ensure_non_negative=True)
        self._check_options()
        used = weight > 0
        label = np.zeros(len(x))
        if groups is not None:
            check_consistent_length(X, groups)
            self.group_names_, label[used] = np.unique(np.asarray(groups)[used], return_inverse=True)
        marked = np.column_stack([target, label])
        x, marked, weight = merge_repeats(x[used], marked[used], weight[used])
        target = marked[:, :-1]
        self._center, self._scale = weighted_moments(x, weight)
        u = with_intercept((x - self._center) / self._scale)
        if groups is None:
            return self._rounds(x, target, weight, u)
        share = np.eye(len(self.group_names_))[marked[:, -1].astype(np.int64)]
        self._round(x, target, weight, u, share)
        self.n_rounds_ = 1
        return self

    def _check_options(self) -> None:
        if self.training not in TRAINING:
            raise ValueError(f"training={self.training!r} is unknown; pass one of {', '.join(TRAINING)}")
        if self.loss not in LOSSES:
            raise ValueError(f"loss={self.loss!r} is unknown; pass one of {', '.join(LOSSES)}")
        if self.n_experts < 1 or self.max_rounds < 1 or self.capacity_slack < 0:
            raise ValueError(
                f"n_experts={self.n_experts} and max_rounds={self.max_rounds} must be at least 1 and "
                f"capacity_slack={self.capacity_slack} at least 0"
            )
        if self.training == "em" and not has_fit_parameter(self._base(), "sample_weight"):
            raise ValueError(f"training='em' needs an estimator with sample_weight, not {self._base()!r}")

    def _rounds(self, x: Array, target: Array, weight: Array, u: Array) -> Self:
        num = min(self.n_experts, len(x))
        rng = check_random_state(self.random_state)
        label = np.empty(len(x), dtype=np.int64)
        label[rng.permutation(len(x))] = np.arange(len(x)) % num
        share, best, self.round_losses_ = np.eye(num)[label], np.inf, []
        order = rng.permutation(len(x))  # who chooses first
        kept: dict[str, Any] = {}
        for _ in range(self.max_rounds):
            self._round(x, target, weight, u, share)
            self.round_losses_.append(self.loss_)
            if self.loss_ >= best - 1e-10 * (1 + abs(best)):
                break
            best = self.loss_
            names = ("estimators_", "loss_", "part_sizes_", "_coef")
            kept = {name: getattr(self, name) for name in names}
            share = self._assign(x, target, weight, u, order)
        self.n_rounds_ = len(self.round_losses_)
        for name, value in kept.items():
            setattr(self, name, value)
        return self

    def _round(self, x: Array, target: Array, weight: Array, u: Array, share: Array) -> None:
        self.part_sizes_ = weight @ share
        y = self._plain(target)
        self.estimators_ = Parallel(n_jobs=self.n_jobs, prefer="threads")(
            delayed(self._train)(x, y, weight * share[:, i]) for i in range(share.shape[1])
        )
        outputs = self._outputs(x)
        self._coef, self.loss_ = _train_gate(u, outputs, target, weight, self.loss, self.alpha)

    def _train(self, x: Array, y: Any, weight: Array) -> Any:
        inside = weight > 1e-12 * weight.max()
        expert = self._base()
        if isinstance(self, ClassifierMixin) and len(np.unique(y[inside])) < 2:
            expert = DummyClassifier()  # a part with one class
        if has_fit_parameter(expert, "sample_weight"):
            return expert.fit(x[inside], y[inside], sample_weight=weight[inside])
        return expert.fit(x[inside], y[inside])

    def _assign(self, x: Array, target: Array, weight: Array, u: Array, order: Array) -> Array:
        logits = u @ self._coef.T
        if self.training == "em":
            square = ((target[:, None] - self._outputs(x)) ** 2).sum(2)
            gate = softmax_rows(logits)[1]
            width = float((weight[:, None] * gate * square).sum() / weight.sum()) / target.shape[1]
            return softmax_rows(logits - 0.5 * square / max(width, 1e-12))[1]
        num = logits.shape[1]
        room = np.full(num, weight.sum() / num + self.capacity_slack)
        share = np.zeros((len(x), num))
        wishes = np.argsort(-logits, axis=1, kind="stable")
        for row in order:
            fits = [choice for choice in wishes[row] if room[choice] >= weight[row]]
            expert = fits[0] if fits else int(room.argmax())  # a heavy row may find no room
            room[expert] -= weight[row]
            share[row, expert] = 1.0
        return share[:, share.sum(0) > 0]

    def _outputs(self, x: Array) -> Array:
        return np.stack([self._output(expert, x) for expert in self.estimators_], axis=1)

    def _gated(self, X: Any) -> tuple[Array, Array]:
        check_is_fitted(self, "estimators_")
        x = validate_data(self, X, dtype=np.float64, reset=False)
        u = with_intercept((x - self._center) / self._scale)
        return softmax_rows(u @ self._coef.T)[1], self._outputs(x)

    def gate_proba(self, X: Any) -> Array:
        """Weight of every expert, `[rows, experts]`."""
        return self._gated(X)[0]

    def predict_experts(self, X: Any) -> Array:
        """Answer of every expert, `[rows, experts, outputs]` (class probabilities for classes)."""
        return self._gated(X)[1]


def _train_gate(
    u: Array, outputs: Array, target: Array, weight: Array, loss: str, alpha: float
) -> tuple[Array, float]:
    """L-BFGS from equal weights, on the mean loss with a ridge on the slopes. Returns coefficients, loss."""
    shape = (outputs.shape[1], u.shape[1])
    share = weight / weight.sum()

    def objective(numbers: Array) -> tuple[float, Array]:
        coef = numbers.reshape(shape)
        value, by_logit, _ = LOSSES[loss](u @ coef.T, outputs, target)
        slope = (share[:, None] * by_logit).T @ u
        slope[:, 1:] += alpha * coef[:, 1:]
        return float(share @ value) + 0.5 * alpha * float((coef[:, 1:] ** 2).sum()), slope.ravel()

    found = minimize(objective, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    return found.x.reshape(shape), float(found.fun)


class GatedEnsembleRegressor(RegressorMixin, GatedEnsemble):
    """A gated ensemble of regressors, see `GatedEnsemble`.

    Args:
        estimator: the kind of expert; None takes `Ridge()`.
        n_experts: number of experts where `fit` gets no groups.
        training: "reassign" or "em".
        loss: of the gate: "blend", "expected" or "mixture".
        max_rounds: most rounds of training experts and gate.
        capacity_slack: rows above an equal part that one expert may hold ("reassign").
        alpha: ridge on the gate's standardised slopes.
        random_state: seed of the first parts.
        n_jobs: threads for the experts.

    Attributes: `estimators_`, `part_sizes_` `[experts]` (sample weight per expert), `loss_`,
    `round_losses_`, `n_rounds_`, and `group_names_` where groups were given.
    """

    def _base(self) -> Any:
        return Ridge() if self.estimator is None else clone(self.estimator)

    def _read(self, X: Any, y: Any) -> tuple[Array, Array]:
        x, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        return x, np.asarray(y, dtype=np.float64)[:, None]

    def _plain(self, target: Array) -> Array:
        return target[:, 0]

    def _output(self, expert: Any, x: Array) -> Array:
        return np.asarray(expert.predict(x), dtype=np.float64).reshape(len(x), -1)

    def predict(self, X: Any) -> Array:
        """Gated mean of the experts' answers, `[rows]`."""
        share, outputs = self._gated(X)
        return np.einsum("te,te->t", share, outputs[:, :, 0])


class GatedEnsembleClassifier(ClassifierMixin, GatedEnsemble):
    """A gated ensemble of classifiers, see `GatedEnsemble`; the losses act on class indicators.

    Args:
        estimator: the kind of expert, with `predict_proba` or `decision_function`; None takes
            `LogisticRegression()`.
        combine: "blend" adds probabilities, "product" multiplies them with the gate as exponents
            (`softmax(sum_i g_i log p_i)`, a product of experts after Hinton 1999); the gate learns for the blend.
        n_experts, training, loss, max_rounds, capacity_slack, alpha, random_state, n_jobs: as for
            `GatedEnsembleRegressor`.
    """

    def __init__(
        self,
        estimator: Any = None,
        n_experts: int = 4,
        *,
        combine: str = "blend",
        training: str = "reassign",
        loss: str = "blend",
        max_rounds: int = 5,
        capacity_slack: int = 1,
        alpha: float = 1e-4,
        random_state: Any = None,
        n_jobs: int | None = None,
    ):
        super().__init__(
            estimator,
            n_experts,
            training=training,
            loss=loss,
            max_rounds=max_rounds,
            capacity_slack=capacity_slack,
            alpha=alpha,
            random_state=random_state,
            n_jobs=n_jobs,
        )
        self.combine = combine

    def _base(self) -> Any:
        return LogisticRegression() if self.estimator is None else clone(self.estimator)

    def _plain(self, target: Array) -> Array:
        return target.argmax(1)

    def _read(self, X: Any, y: Any) -> tuple[Array, Array]:
        if self.combine not in ("blend", "product"):
            raise ValueError(f"combine={self.combine!r} is unknown; pass blend or product")
        x, y = validate_data(self, X, y, dtype=np.float64)
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        self.classes_, index = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y has one class, {self.classes_[0]}; this classifier needs at least two classes")
        return x, np.eye(len(self.classes_))[index]

    def _output(self, expert: Any, x: Array) -> Array:
        return class_probabilities(expert, x, len(self.classes_))

    def predict_proba(self, X: Any) -> Array:
        """Class probabilities, `[rows, classes]`."""
        share, outputs = self._gated(X)
        if self.combine == "blend":
            return np.einsum("te,tec->tc", share, outputs)
        log_proba = np.log(np.maximum(outputs, 1e-300))
        return softmax_rows(np.einsum("te,tec->tc", share, log_proba))[1]

    def predict(self, X: Any) -> Any:
        """Most probable class of each row."""
        best = self.predict_proba(X).argmax(1)
        return self.classes_[best]
