"""Extreme learning machines: a random hidden layer and least squares (Huang, Zhu & Siew 2006)."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from scipy.special import expit
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import Tags, check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, column_or_1d, validate_data

from moestro.mixtures.numerics import Array, weighted_moments


class ExtremeLearningMachine(BaseEstimator):
    """Base of `ELMRegressor` and `ELMClassifier`.

    H = σ(X W + b),  W, b ~ U(-1, 1) fixed,  B = argmin sum_t w_t |y_t - c - H_tB|² + α |B|²
    """

    def __init__(self, hidden: int = 50, *, alpha: float = 1e-3, random_state: Any = None):
        self.hidden = hidden
        self.alpha = alpha
        self.random_state = random_state

    def _solve(self, x: Array, y: Array, weight: Array) -> None:
        if self.hidden < 1 or self.alpha < 0:
            raise ValueError(f"hidden={self.hidden} must be at least 1 and alpha={self.alpha} at least 0")
        if weight.sum() <= 0:
            raise ValueError("sample_weight is zero everywhere; pass at least one non-zero weight")
        self._center, self._scale = weighted_moments(x, weight)
        rng = check_random_state(self.random_state)
        self.hidden_coef_ = rng.uniform(-1, 1, (x.shape[1], self.hidden))
        self.hidden_intercept_ = rng.uniform(-1, 1, self.hidden)
        h = self.hidden_features(x)
        h_mean, y_mean = weight @ h / weight.sum(), weight @ y / weight.sum()
        root = np.sqrt(weight)[:, None]
        design, wanted = root * (h - h_mean), root * (y - y_mean)
        if self.alpha > 0:
            gram = design.T @ design + self.alpha * np.eye(self.hidden)
            self.coef_ = np.linalg.solve(gram, design.T @ wanted)
        else:
            self.coef_ = np.linalg.lstsq(design, wanted, rcond=1e-10)[0]
        self.intercept_ = y_mean - h_mean @ self.coef_

    def hidden_features(self, X: Any) -> Array:
        """The random features `[rows, hidden]`."""
        x = np.asarray(X, dtype=np.float64)
        return np.asarray(expit((x - self._center) / self._scale @ self.hidden_coef_ + self.hidden_intercept_))

    def _answer(self, X: Any) -> Array:
        check_is_fitted(self)
        x = validate_data(self, X, dtype=np.float64, reset=False)
        return self.hidden_features(x) @ self.coef_ + self.intercept_


class ELMRegressor(RegressorMixin, ExtremeLearningMachine):
    """Regression on random sigmoid features of the standardised inputs, in closed form.

    Args:
        hidden: number of random features.
        alpha: ridge; 0 takes the pseudo-inverse.
        random_state: seed of the features.

    Attributes: `hidden_coef_` `[features, hidden]`, `hidden_intercept_` `[hidden]`, `coef_` `[hidden, outputs]`,
    `intercept_` `[outputs]`.
    """

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Fit to inputs `[rows, features]` and targets `[rows]` or `[rows, outputs]`."""
        x, y = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True)
        weight = _check_sample_weight(sample_weight, x, dtype=np.float64, ensure_non_negative=True)
        self._flat = y.ndim == 1
        self._solve(x, np.asarray(y, dtype=np.float64).reshape(len(y), -1), weight)
        return self

    def predict(self, X: Any) -> Array:
        """Targets in the form of y."""
        answer = self._answer(X)
        return answer[:, 0] if self._flat else answer


class ELMClassifier(ClassifierMixin, ExtremeLearningMachine):
    """Classification by least squares of class indicators on random sigmoid features.

    Args:
        hidden, alpha, random_state: as for `ELMRegressor`.

    Attributes: `classes_`, and those of `ELMRegressor` with one output per class.
    """

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Fit to inputs `[rows, features]` and class labels `[rows]`."""
        x, y = validate_data(self, X, y, dtype=np.float64)
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        weight = _check_sample_weight(sample_weight, x, dtype=np.float64, ensure_non_negative=True)
        self.classes_, index = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y has one class, {self.classes_[0]!r}; this classifier needs at least two classes")
        self._solve(x, np.eye(len(self.classes_))[index], weight)
        return self

    def predict_proba(self, X: Any) -> Array:
        """The fitted indicators, clipped to 0 and 1 and normalised, `[rows, classes]`."""
        share = np.clip(self._answer(X), 1e-6, 1.0)
        return share / share.sum(1, keepdims=True)

    def predict(self, X: Any) -> Any:
        """Class of the largest indicator."""
        best = self.predict_proba(X).argmax(1)
        return self.classes_[best]
