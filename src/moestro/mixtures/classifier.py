"""Mixture of experts for classification."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import ClassifierMixin
from sklearn.utils import Tags, check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d, validate_data

from moestro.mixtures.base import MixtureOfExperts
from moestro.mixtures.experts import CLASSIFICATION_EXPERTS, ConstantClassExpert, Expert, LogisticExpert
from moestro.mixtures.gates import Gate
from moestro.mixtures.numerics import Array, draw_labels


class MixtureOfExpertsClassifier(ClassifierMixin, MixtureOfExperts):
    """Classification by a gate that shares the input space among (multinomial) logistic experts.

        P(c|x) = sum_i g_i(x) P_i(c|x)    Jordan & Jacobs 1994; Chen, Xu & Chi 1999

    Args:
        n_experts: number of experts of a flat mixture; None means 2, or the leaves of `branching`.
        branching: children per node for every level of a tree of softmax gates.
        gate: "softmax", "gaussian", "constant", "exponential-family", "kernel", "reconstruction" or a gate object
            with other options.
        expert: "multinomial", "logistic" (two classes), "constant", "svm", "elm" (extreme learning machines), an
            expert object with other options, or any classifier of scikit-learn that takes sample_weight.
        gate_features, expert_features, algorithm, stopping, tol, max_iter, n_init, init, warm_start, random_state,
            verbose, n_jobs: as for `MixtureOfExpertsRegressor`.

    Attributes: `classes_`, gate attributes as for `MixtureOfExpertsRegressor`, `expert_coef_`
    `[experts, classes, features]` and `expert_intercept_` `[experts, classes]` with the last class at 0 (one row,
    the logit of the second class, for logistic experts), `loglik_`, `n_parameters_` and the rest as there.
    """

    _experts = CLASSIFICATION_EXPERTS

    def __init__(
        self,
        n_experts: int | None = None,
        *,
        branching: tuple[int, ...] | None = None,
        gate: str | Gate = "softmax",
        expert: str | Expert = "multinomial",
        gate_features: Any = None,
        expert_features: Any = None,
        algorithm: str = "em",
        stopping: str = "change",
        tol: float = 1e-6,
        max_iter: int = 500,
        n_init: int = 5,
        init: Any = "auto",
        warm_start: bool = False,
        random_state: Any = None,
        verbose: int = 0,
        n_jobs: int | None = None,
    ):
        super().__init__(
            n_experts,
            branching=branching,
            gate=gate,
            expert=expert,
            gate_features=gate_features,
            expert_features=expert_features,
            algorithm=algorithm,
            stopping=stopping,
            tol=tol,
            max_iter=max_iter,
            n_init=n_init,
            init=init,
            warm_start=warm_start,
            random_state=random_state,
            verbose=verbose,
            n_jobs=n_jobs,
        )

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = not (
            self.expert == "logistic" or isinstance(self.expert, LogisticExpert)
        )
        tags.classifier_tags.poor_score = self.expert == "constant" or isinstance(self.expert, ConstantClassExpert)
        return tags

    def _validate(self, X: Any, y: Any) -> tuple[Array, Any]:
        x, y = validate_data(self, X, y, dtype=np.float64)
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        return x, y

    def _encode(self, y: Any) -> Array:
        self.classes_, index = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                f"y has one class, {self.classes_[0]!r}; this classifier needs samples of at least two classes"
            )
        return np.eye(len(self.classes_))[index]

    def _check_target(self, y: Array, expert: Expert) -> None:
        if isinstance(expert, LogisticExpert) and y.shape[1] > 2:
            raise ValueError(
                "Only binary classification is supported by logistic experts. "
                f"y has {y.shape[1]} classes; pass expert='multinomial'"
            )

    def _known(self, y: Any) -> Array:
        y = column_or_1d(y)
        index = np.searchsorted(self.classes_, y)
        index = np.minimum(index, len(self.classes_) - 1)
        unknown = self.classes_[index] != y
        if unknown.any():
            raise ValueError(f"y has the class {y[unknown][0]}; fit saw {self.classes_.tolist()}")
        return np.eye(len(self.classes_))[index]

    def predict_proba(self, X: Any) -> Array:
        """Class probabilities, `[rows, classes]`."""
        u, z = self._features(X)
        by_expert = self.mixture_.expert.mean(self.mixture_.expert_params, z)
        proba = (self.mixture_.share(u)[:, :, None] * by_expert).sum(1)
        return proba / proba.sum(1, keepdims=True)

    def predict_log_proba(self, X: Any) -> Array:
        """Logarithms of `predict_proba`."""
        with np.errstate(divide="ignore"):
            return np.log(self.predict_proba(X))

    def predict(self, X: Any) -> Any:
        """Most probable class of each row."""
        best = self.predict_proba(X).argmax(1)
        return self.classes_[best]

    def predict_experts(self, X: Any) -> Array:
        """Class probabilities of every expert, `[rows, experts, classes]`."""
        return self.mixture_.expert.mean(self.mixture_.expert_params, self._features(X)[1])

    def sample(self, X: Any, random_state: Any = None) -> Any:
        """One class drawn from `P(c | x)` for each row."""
        rng = check_random_state(random_state)
        return self.classes_[draw_labels(self.predict_proba(X), rng)]
