"""Finding a sparse mixing matrix behind Gaussian sources (Abrahamsen & Rigollet 2018)."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from scipy.optimize import linprog, nnls
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from moestro.mixtures.numerics import Array

_INDEPENDENT = 1e-3  # smallest singular value of the directions kept


class SparseGaussianICA(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Recovers a sparse A of `x = A s` from the covariance `AAᵀ` alone, where sources s are normal.

    The rows of `Y = Λ^½ Uᵀ` (leading eigenvectors) span the columns of A. For every coordinate i a linear program
    `min |Yᵀw|_1 with (Y e_i)ᵀ w = 1` proposes a sparse direction in that span; the sparsest independent ones are
    kept and scaled by non-negative least squares of the covariance. Signs and order of the columns cannot be known.
    The recovery in the spirit of ER-SpUD is our formulation; a dense A is not identifiable and gets some answer.

    Args:
        n_components: number of sources; None takes the numerical rank of the covariance.

    Attributes: `mixing_` `[features, components]`, `components_` `[components, features]` (its pseudo-inverse),
    `mean_`, `covariance_`.
    """

    def __init__(self, n_components: int | None = None):
        self.n_components = n_components

    def fit(self, X: Any, y: Any = None) -> Self:
        """Fit to the sample covariance of rows `[rows, features]`."""
        x = validate_data(self, X, dtype=np.float64, ensure_min_samples=2)
        self.mean_ = x.mean(0)
        centred = x - self.mean_
        return self._solve(centred.T @ centred / len(x), self.mean_)

    def fit_covariance(self, covariance: Any) -> Self:
        """Fit to a known covariance `[features, features]`; the mean is 0."""
        matrix = np.asarray(covariance, dtype=np.float64)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not np.allclose(matrix, matrix.T):
            raise ValueError(f"covariance has shape {matrix.shape}; pass a symmetric square matrix")
        self.n_features_in_ = len(matrix)
        return self._solve(matrix, np.zeros(len(matrix)))

    def _solve(self, covariance: Array, mean: Array) -> Self:
        values, vectors = np.linalg.eigh(covariance)
        rank = int((values > 1e-10 * max(float(values[-1]), 1e-300)).sum())
        num = rank if self.n_components is None else self.n_components
        if not 1 <= num <= len(covariance):
            raise ValueError(
                f"n_components={self.n_components} with a covariance of rank {rank} and {len(covariance)} "
                "features; pass between 1 and the number of features, and inputs that vary"
            )
        span = vectors[:, -num:] * np.sqrt(np.maximum(values[-num:], 0.0))  # [features, components], Yᵀ
        directions = _sparsest(span, _candidates(span))
        pairs = np.stack([np.outer(column, column).ravel() for column in directions.T], axis=1)
        scale = nnls(pairs, covariance.ravel())[0]
        self.mean_, self.covariance_ = mean, covariance
        self.mixing_ = directions * np.sqrt(scale)
        self.components_ = np.linalg.pinv(self.mixing_)
        return self

    @property
    def _n_features_out(self) -> int:
        return self.mixing_.shape[1]

    def transform(self, X: Any) -> Array:
        """Estimated sources `[rows, components]`."""
        check_is_fitted(self)
        x = validate_data(self, X, dtype=np.float64, reset=False)
        return (x - self.mean_) @ self.components_.T

    def inverse_transform(self, X: Any) -> Array:
        """Rows `[rows, features]` of sources."""
        check_is_fitted(self)
        return np.asarray(X, dtype=np.float64) @ self.mixing_.T + self.mean_


def _candidates(span: Array) -> Array:
    """One unit direction per coordinate that it reaches, `[features, candidates]`, and the span's own columns."""
    features, num = span.shape
    cost = np.concatenate([np.zeros(num), np.ones(features)])
    bound = np.block([[span, -np.eye(features)], [-span, -np.eye(features)]])  # |Yᵀw| <= t
    limits = [(None, None)] * num + [(0, None)] * features
    found = []
    for row in span:
        if np.abs(row).max() < 1e-10 * np.abs(span).max():
            continue
        equal = np.concatenate([row, np.zeros(features)])[None]
        solved = linprog(cost, bound, np.zeros(2 * features), equal, [1.0], bounds=limits, method="highs")
        if solved.status == 0:
            found.append(span @ solved.x[:num])
    every = np.column_stack([*found, span])
    size = np.linalg.norm(every, axis=0)
    return every[:, size > 1e-12 * max(size.max(), 1e-300)] / size[size > 1e-12 * max(size.max(), 1e-300)]


def _sparsest(span: Array, candidates: Array) -> Array:
    """Greedily the sparsest independent candidates: few entries, then a small sum of absolute values."""
    entries = (np.abs(candidates) > 1e-6).sum(0)
    order = np.lexsort((np.abs(candidates).sum(0), entries))
    kept: list[Array] = []
    for k in order:
        tried = np.column_stack([*kept, candidates[:, k]])
        if np.linalg.svd(tried, compute_uv=False)[-1] > _INDEPENDENT:
            kept.append(candidates[:, k])
        if len(kept) == span.shape[1]:
            break
    return np.column_stack(kept)
