"""Weighted linear algebra that the gates and the experts share: moments, Gram matrices, least squares."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.lapack import dposv
from scipy.special import digamma, gammaln, zeta

Array = NDArray[Any]  # float64 unless a name says otherwise

_ROWS_PER_BLOCK = 2048  # a block of products stays in the cache
_CONDITION = 1e-8  # below it the normal equations lose too many digits and the rows are factored instead


def weighted_moments(x: Array, weight: Array) -> tuple[Array, Array]:
    """Weighted mean and standard deviation of each column; a constant column gets deviation 1."""
    total = weight.sum()
    center = weight @ x / total
    scale = np.sqrt(weight @ (x - center) ** 2 / total)
    constant = scale <= 1e-12 * np.maximum(1.0, np.abs(center))
    return center, np.where(constant, 1.0, scale)


def row_max(x: Array) -> Array:
    """Largest entry of each row, `[rows]`: column after column, many times faster than numpy for a few columns."""
    top = x[:, 0].copy()
    for column in range(1, x.shape[1]):
        np.maximum(top, x[:, column], out=top)
    return top


def row_sum(x: Array) -> Array:
    """Sum of each row, `[rows]`, as a matrix product."""
    total: Array = x @ np.ones(x.shape[1])
    return total


def softmax_rows(logits: Array) -> tuple[Array, Array]:
    """Row-wise log-sum-exp and normalised exponentials.

    Shapes: logits `[rows, experts]` -> `[rows]`, `[rows, experts]`.
    """
    top = row_max(logits)[:, None]
    top[~np.isfinite(top)] = 0.0  # a row that no expert can explain
    share = np.exp(logits - top)
    total = row_sum(share)[:, None]
    with np.errstate(divide="ignore"):
        log_total = np.log(total)
    empty = total[:, 0] == 0
    if empty.any():
        share[empty], total[empty] = 1.0, share.shape[1]
    share /= total
    return (log_total + top)[:, 0], share


def draw_labels(share: Array, rng: np.random.RandomState) -> Array:
    """One expert for each row by its probabilities. Shapes: `[rows, experts]` -> `[rows]`."""
    label = (share.cumsum(1) < rng.random_sample(len(share))[:, None]).sum(1)
    return np.minimum(label, share.shape[1] - 1)  # rounding may leave a sum below one


@lru_cache(maxsize=64)
def upper_indices(size: int) -> tuple[Array, Array]:
    """Row and column of the entries on and above the diagonal."""
    rows, columns = np.triu_indices(size)
    return rows, columns


def weighted_gram(z: Array, weights: Array | Callable[[slice], Array]) -> Array:
    """All matrices `sum_t weights[t, k] z_t z_tᵀ` in one pass.

    Forms the p(p+1)/2 distinct products of a block of rows once, one product to a line of memory, and multiplies
    them with every column of weights, so that k Gram matrices cost one matrix product.
    Shapes: z `[rows, p]`, weights `[rows, k]`, or a function that gives them for a slice of rows -> `[k, p, p]`.
    """
    num_rows, p = z.shape
    upper = upper_indices(p)
    packed: Any = 0.0
    products = np.empty((len(upper[0]), min(num_rows, _ROWS_PER_BLOCK)))
    for start in range(0, num_rows, _ROWS_PER_BLOCK):
        here = slice(start, start + _ROWS_PER_BLOCK)
        block = np.ascontiguousarray(z[here].T)
        lines = products[:, : block.shape[1]]
        at = 0
        for column in range(p):
            np.multiply(block[column:], block[column], out=lines[at : at + p - column])
            at += p - column
        packed = packed + lines @ (weights(here) if callable(weights) else weights[here])
    gram = np.empty((packed.shape[1], p, p))
    gram[:, upper[0], upper[1]] = packed.T
    gram[:, upper[1], upper[0]] = packed.T
    return gram


def predictions(z: Array, coef: Array) -> Array:
    """Linear predictors of all experts as one product.

    Shapes: z `[rows, p]`, coef `[experts, p, q]` -> `[rows, experts, q]`.
    """
    num_experts, p, q = coef.shape
    return (z @ coef.transpose(1, 0, 2).reshape(p, num_experts * q)).reshape(len(z), num_experts, q)


def least_squares(z: Array, y: Array, mass: Array, penalty: Array) -> Array:
    """Weighted ridge regressions `argmin_B sum_t mass[t, i] |y_t - Bᵀz_t|² + sum_k penalty_k B_k²`, one per expert.

    Solves the normal equations; an expert whose (standardised) Gram matrix is nearly singular is solved by a
    singular value decomposition of its weighted rows, which returns the smallest solution.
    Shapes: z `[rows, p]`, y `[rows, q]` or `[rows, experts, q]`, mass `[rows, experts]`, penalty `[p]`
    -> `[experts, p, q]`.
    """
    gram = weighted_gram(z, mass) + np.diag(penalty)
    own_target = y.ndim == 3
    if own_target:
        cross = np.stack([z.T @ (mass[:, i, None] * y[:, i]) for i in range(mass.shape[1])])
    else:
        stacked = (mass[:, :, None] * y[:, None, :]).reshape(len(y), -1)
        cross = (z.T @ stacked).reshape(z.shape[1], mass.shape[1], -1).transpose(1, 0, 2)
    size = np.sqrt(np.maximum(np.einsum("epp->ep", gram), 1e-300))
    values, vectors = np.linalg.eigh(gram / (size[:, :, None] * size[:, None, :]))
    sound = values[:, 0] > _CONDITION * values[:, -1]
    inverse = 1.0 / np.where(sound[:, None], values, 1.0)
    coef = vectors @ (inverse[:, :, None] * (vectors.transpose(0, 2, 1) @ (cross / size[:, :, None])))
    coef /= size[:, :, None]
    for i in np.flatnonzero(~sound):
        coef[i] = _factor_rows(z, y[:, i] if own_target else y, mass[:, i], penalty)
    return coef


def _factor_rows(z: Array, y: Array, mass: Array, penalty: Array) -> Array:
    used = mass > 0
    root = np.sqrt(mass[used])[:, None]
    rows, target = root * z[used], root * y[used]
    if penalty.any():
        rows = np.vstack([rows, np.diag(np.sqrt(penalty))])
        target = np.vstack([target, np.zeros((len(penalty), y.shape[1]))])
    return np.linalg.lstsq(rows, target, rcond=1e-10)[0]


def scatter(error: Array, mass: Array) -> Array:
    """`sum_t mass[t, i] e_ti e_tiᵀ`. Shapes: `[rows, experts, q]`, `[rows, experts]` -> `[experts, q, q]`."""
    if error.shape[2] == 1:
        return np.einsum("te,te->e", mass, error[:, :, 0] ** 2)[:, None, None]
    return np.stack([(mass[:, i, None] * error[:, i]).T @ error[:, i] for i in range(mass.shape[1])])


def solve_positive(matrix: Array, vector: Array) -> Array:
    """Solve with a symmetric positive semi-definite matrix, with a last resort for singular ones."""
    size = matrix.shape[0]
    nudged = matrix + np.eye(size) * (1e-12 * np.trace(matrix) / size + 1e-300)
    _, answer, trouble = dposv(nudged, vector[:, None], lower=1)
    if trouble:
        return np.linalg.lstsq(matrix, vector, rcond=None)[0]
    return answer[:, 0]


def is_empty(mass_per_expert: Array, total: float) -> Array:
    """Experts that hold too little mass to be refitted."""
    return mass_per_expert < max(1e-8 * total, np.finfo(float).tiny)


def gamma_peak(a: Array) -> Array:
    """`a log a - a - log Γ(a)`, the log-density of a gamma of mean 1 at 1: Stirling's series above 30, where the
    three terms would cancel."""
    large = np.maximum(a, 30.0)
    series = 0.5 * np.log(large / (2 * np.pi)) - (1 - (1 - 2 / (7 * large**2)) / (30 * large**2)) / (12 * large)
    return np.where(a > 30, series, a * np.log(a) - a - gammaln(a))


def gamma_shape(gap: Array) -> Array:
    """Solves `log a - ψ(a) = gap` by Newton steps from Minka's start, on [1e-3, 1e6]."""
    gap = np.maximum(gap, 5e-7)  # a <= 1e6
    a = (3 - gap + np.sqrt((gap - 3) ** 2 + 24 * gap)) / (12 * gap)
    for _ in range(10):  # zeta(2, a) is the trigamma function
        before, a = a, np.clip(a - (np.log(a) - digamma(a) - gap) / (1 / a - zeta(2, a)), 1e-3, 1e6)
        if (np.abs(a - before) <= 1e-15 * a).all():
            break
    return a
