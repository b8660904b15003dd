"""Shapes that a set of covariance matrices may take: their M-step, floor, free numbers and gradient."""

from __future__ import annotations

import numpy as np

from moestro.mixtures.numerics import Array

KINDS = ("full", "diag", "spherical", "tied", "tied-diag", "tied-spherical")
RANK = "rank-"  # "rank-k": `W Wᵀ + σ² I` with k columns in W


def check_kind(kind: str) -> None:
    """Raise ValueError for a kind that does not exist."""
    if kind not in KINDS and not (kind.startswith(RANK) and kind[len(RANK) :].isdigit()):
        raise ValueError(f"covariance={kind!r} is unknown; pass one of {', '.join(KINDS)}, rank-1, rank-2 ...")


def _rank(kind: str, q: int) -> int:
    return min(int(kind[len(RANK) :]), q - 1)


def maximise(scatter: Array, mass: Array, kind: str, floor: float) -> Array:
    """Most likely covariances of a kind with no eigenvalue below floor.

    Clipping eigenvalues is the exact constrained maximum, so the floor never lowers the likelihood of a step.
    Shapes: scatter `[n, q, q]`, mass `[n]` -> `[n, q, q]`.
    """
    q = scatter.shape[1]
    if kind.startswith("tied"):
        covariance = np.broadcast_to(scatter.sum(0) / max(mass.sum(), 1e-300), scatter.shape)
    else:
        covariance = scatter / np.maximum(mass, 1e-300)[:, None, None]
    diagonal = np.einsum("nqq->nq", covariance)
    if kind.endswith("spherical"):
        diagonal = np.repeat(diagonal.mean(1, keepdims=True), q, axis=1)
    if q == 1 or kind.endswith(("diag", "spherical")):
        return np.maximum(diagonal, floor)[:, :, None] * np.eye(q)
    values, vectors = np.linalg.eigh(covariance)
    if kind.startswith(RANK):  # the smallest eigenvalues become their mean (Tipping & Bishop 1999)
        rest = q - _rank(kind, q)
        values[:, :rest] = values[:, :rest].mean(1, keepdims=True)
        return (vectors * np.maximum(values, floor)[:, None, :]) @ vectors.transpose(0, 2, 1)
    if values.min() >= floor:
        return 0.5 * (covariance + covariance.transpose(0, 2, 1))
    return (vectors * np.maximum(values, floor)[:, None, :]) @ vectors.transpose(0, 2, 1)


def count(kind: str, num: int, q: int) -> int:
    """Free numbers of n covariance matrices of size q."""
    if kind.startswith(RANK):
        k = _rank(kind, q)
        return num * (q * k - k * (k - 1) // 2 + 1)
    one = {"full": q * (q + 1) // 2, "tied": q * (q + 1) // 2, "diag": q, "tied-diag": q}.get(kind, 1)
    return one if kind.startswith("tied") else num * one


def free(covariance: Array, kind: str) -> Array:
    """Unconstrained numbers: half log-variances, or Cholesky factors with a log diagonal."""
    if kind.startswith("tied"):
        covariance = covariance[:1]
    if kind.startswith(RANK):
        factor, variance = _factor(covariance, _rank(kind, covariance.shape[1]))
        return np.column_stack([_packed(factor), 0.5 * np.log(variance)]).ravel()
    if kind.endswith("spherical"):
        return 0.5 * np.log(covariance[:, 0, 0])
    if kind.endswith("diag"):
        return 0.5 * np.log(np.einsum("nqq->nq", covariance)).ravel()
    lower = np.linalg.cholesky(covariance)
    q = lower.shape[1]
    lower[:, range(q), range(q)] = np.log(lower[:, range(q), range(q)])
    return lower[:, *np.tril_indices(q)].ravel()


def restore(numbers: Array, like: Array, kind: str) -> Array:
    """Inverse of `free`; `like` gives the shape `[n, q, q]`."""
    num, q, _ = like.shape
    if kind.startswith(RANK):
        rows = numbers.reshape(num, -1)
        factor = np.zeros((num, q, _rank(kind, q)))
        factor[:, *np.tril_indices(q, m=factor.shape[2])] = rows[:, :-1]
        diagonal = range(factor.shape[2])
        factor[:, diagonal, diagonal] = np.exp(factor[:, diagonal, diagonal])
        return factor @ factor.transpose(0, 2, 1) + np.exp(2 * rows[:, -1])[:, None, None] * np.eye(q)
    own = 1 if kind.startswith("tied") else num
    if kind.endswith(("spherical", "diag")):
        deviation = np.exp(numbers.reshape(own, -1))
        covariance = (deviation**2)[:, :, None] * np.eye(q)
    else:
        lower = np.zeros((own, q, q))
        lower[:, *np.tril_indices(q)] = numbers.reshape(own, -1)
        lower[:, range(q), range(q)] = np.exp(lower[:, range(q), range(q)])
        covariance = lower @ lower.transpose(0, 2, 1)
    return np.array(np.broadcast_to(covariance, like.shape))


def gradient(scatter: Array, mass: Array, covariance: Array, kind: str) -> Array:
    """Gradient of `sum_i -½ mass_i log|S_i| - ½ tr(S_i⁻¹ scatter_i)` in the free numbers."""
    inverse = np.linalg.inv(covariance)
    slope = 0.5 * (inverse @ scatter @ inverse - mass[:, None, None] * inverse)
    if kind.startswith("tied"):
        slope, covariance = slope.sum(0, keepdims=True), covariance[:1]
    if kind.startswith(RANK):
        factor, variance = _factor(covariance, _rank(kind, covariance.shape[1]))
        by_factor = 2.0 * slope @ factor
        diagonal = range(factor.shape[2])
        by_factor[:, diagonal, diagonal] *= factor[:, diagonal, diagonal]
        places = np.tril_indices(factor.shape[1], m=factor.shape[2])
        return np.column_stack([by_factor[:, *places], 2.0 * variance * np.einsum("nqq->n", slope)]).ravel()
    diagonal = 2.0 * np.einsum("nqq,nqq->nq", slope, covariance)
    if kind.endswith("spherical"):
        return diagonal.sum(1)
    if kind.endswith("diag"):
        return diagonal.ravel()
    lower = np.linalg.cholesky(covariance)
    by_factor = 2.0 * slope @ lower
    q = lower.shape[1]
    by_factor[:, range(q), range(q)] *= lower[:, range(q), range(q)]
    return by_factor[:, *np.tril_indices(q)].ravel()


def _factor(covariance: Array, k: int) -> tuple[Array, Array]:
    """Of `W Wᵀ + σ² I`: the unique lower-triangular W `[n, q, k]` with a positive diagonal, and σ²."""
    values, vectors = np.linalg.eigh(covariance)
    q = covariance.shape[1]
    variance = values[:, 0]
    wide = vectors[:, :, q - k :] * np.sqrt(np.maximum(values[:, q - k :] - variance[:, None], 0.0))[:, None, :]
    factor = np.linalg.qr(wide.transpose(0, 2, 1))[1].transpose(0, 2, 1) if k else wide
    sign = np.sign(factor[:, range(k), range(k)])
    return factor * np.where(sign == 0, 1.0, sign)[:, None, :], variance


def _packed(factor: Array) -> Array:
    diagonal = range(factor.shape[2])
    factor = factor.copy()
    factor[:, diagonal, diagonal] = np.log(np.maximum(factor[:, diagonal, diagonal], 1e-150))
    return factor[:, *np.tril_indices(factor.shape[1], m=factor.shape[2])]
