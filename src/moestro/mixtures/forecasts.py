"""Weighting forecasters by their record (Ban & Mansour 2018)."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted, validate_data

from moestro.mixtures.numerics import Array

WEIGHTING = ("precision", "covariance", "equal")


class ForecastAggregator(RegressorMixin, BaseEstimator):
    """Combines forecasts of the same outcome, every forecaster debiased and weighted by its past precision.

        b_e = m_e / (m_e + κ) mean(x_te - y_t),   v_e = (m_e var_e + κ v̄) / (m_e + κ),   ŷ = sum_e w_e (x_e - b_e)

    with m_e past forecasts of forecaster e and w ∝ 1/v over those who forecast. Whether forecasters differ in bias
    and skill is the question of Ban & Mansour 2018; these formulas are ours, in their spirit.

    Args:
        bias: correct every forecaster's mean error.
        weighting: "precision"; "covariance" (`w ∝ S⁻¹1` with the shrunk covariance S of the errors, for forecasters
            who err together); "equal".
        shrinkage: past forecasts' worth κ of belief that all forecasters are alike and unbiased.

    X holds one column per forecaster, NaN where one is silent; a row without any forecast gets the mean outcome.
    `fit` and `partial_fit` learn from rows whose outcomes are known: to look at the past only, predict a row before
    learning it.

    Attributes: `bias_`, `variance_`, `weights_` (when all forecast), `count_` `[forecasters]`, `covariance_`
    `[forecasters, forecasters]`, `differentiation_`: `1 - MSE(combined) / MSE(plain mean)` on the rows learned, and
    the same for debiasing alone, `bias_gain_`.
    """

    def __init__(self, *, bias: bool = True, weighting: str = "precision", shrinkage: float = 5.0):
        self.bias = bias
        self.weighting = weighting
        self.shrinkage = shrinkage

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.regressor_tags.poor_score = True  # arbitrary columns are no forecasts
        return tags

    def fit(self, X: Any, y: Any) -> Self:
        """Learn from forecasts `[rows, forecasters]` and outcomes `[rows]` alone."""
        self._check_options()
        forecasts, outcome = self._read(X, y, True)
        self._rows, self._outcomes = forecasts[:0], outcome[:0]
        return self._learn(forecasts, outcome)

    def partial_fit(self, X: Any, y: Any) -> Self:
        """Learn from more rows; they are kept, because centring needs all of them."""
        self._check_options()
        if not hasattr(self, "_rows"):
            return self.fit(X, y)
        return self._learn(*self._read(X, y, False))

    def _check_options(self) -> None:
        if self.weighting not in WEIGHTING:
            raise ValueError(f"weighting={self.weighting!r} is unknown; pass one of {', '.join(WEIGHTING)}")
        if self.shrinkage < 0:
            raise ValueError(f"shrinkage={self.shrinkage} must be at least 0")

    def _read(self, X: Any, y: Any, reset: bool) -> tuple[Array, Array]:
        x, y = validate_data(
            self, X, y, dtype=np.float64, ensure_all_finite="allow-nan", y_numeric=True, reset=reset
        )
        return x, np.asarray(y, dtype=np.float64)

    def _learn(self, forecasts: Array, outcome: Array) -> Self:
        self._rows = np.concatenate([self._rows, forecasts])
        self._outcomes = np.concatenate([self._outcomes, outcome])
        error = self._rows - self._outcomes[:, None]
        here = ~np.isnan(error)
        error = np.where(here, error, 0.0)
        self.count_ = here.sum(0)
        counted = np.maximum(self.count_, 1)
        keep = self.count_ / np.maximum(self.count_ + self.shrinkage, 1e-300)
        self.bias_ = keep * error.sum(0) / counted if self.bias else np.zeros(error.shape[1])
        centred = np.where(here, error - self.bias_, 0.0)
        own = (centred**2).sum(0) / counted
        pool = float(self.count_ @ own / max(int(self.count_.sum()), 1))
        self.variance_ = np.maximum(keep * own + (1 - keep) * pool, 1e-12 * max(pool, 1e-300))
        self.covariance_ = self._covariance(centred, here)
        self._mean = float(self._outcomes.mean())
        self.weights_ = self._weights(np.ones((1, error.shape[1]), dtype=bool))[0]
        self._compare()
        return self

    def _covariance(self, centred: Array, here: Array) -> Array:
        """Of the errors over rows that both forecast, shrunk to the diagonal."""
        both = here.T.astype(np.float64) @ here
        shared = np.maximum(both, 1.0)
        keep = both / np.maximum(both + self.shrinkage, 1e-300)
        found = keep * (centred.T @ centred) / shared
        found[np.diag_indices(len(found))] = self.variance_
        lowest = float(np.linalg.eigvalsh(found).min())  # pairs of different rows need not fit together
        return found + max(0.0, 1e-9 * float(self.variance_.max()) - lowest) * np.eye(len(found))

    def _weights(self, here: Array) -> Array:
        """Weights of the forecasters present, `[rows, forecasters]`; rows of zeros where nobody is."""
        if self.weighting == "covariance":
            patterns, back = np.unique(here, axis=0, return_inverse=True)
            found = np.zeros(patterns.shape)
            for row, present in zip(found, patterns, strict=True):
                inside = np.flatnonzero(present)
                if len(inside):
                    row[inside] = np.linalg.solve(self.covariance_[np.ix_(inside, inside)], np.ones(len(inside)))
            raw = found[back.reshape(-1)]
        else:
            raw = here * (1 / self.variance_ if self.weighting == "precision" else 1.0)
        total = raw.sum(1, keepdims=True)
        return raw / np.where(total == 0, 1.0, total)

    def _compare(self) -> None:
        here = ~np.isnan(self._rows)
        used = here.any(1)
        if not used.any():
            self.differentiation_ = self.bias_gain_ = 0.0
            return
        rows, outcome, here = np.where(here, self._rows, 0.0)[used], self._outcomes[used], here[used]
        plain = here / here.sum(1, keepdims=True)

        def loss(weight: Array, bias: Array) -> float:
            return float((((weight * (rows - bias)).sum(1) - outcome) ** 2).mean())

        base = loss(plain, np.zeros(rows.shape[1]))
        gain = [loss(self._weights(here), self.bias_), loss(plain, self.bias_)]
        self.differentiation_, self.bias_gain_ = (1 - value / base if base > 0 else 0.0 for value in gain)

    def predict(self, X: Any) -> Array:
        """Combined forecast of each row, `[rows]`."""
        check_is_fitted(self)
        x = validate_data(self, X, dtype=np.float64, ensure_all_finite="allow-nan", reset=False)
        here = ~np.isnan(x)
        answer = (self._weights(here) * (np.where(here, x, 0.0) - self.bias_)).sum(1)
        return np.where(here.any(1), answer, self._mean)
