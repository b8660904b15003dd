"""First guesses of who explains what.

Every kind treats a row of weight k as k equal rows: all randomness is drawn per direction, per quantile or per
expert, never per row.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moestro.mixtures.numerics import Array, least_squares, predictions
from moestro.mixtures.rows import Rows, with_intercept

Starter = Callable[[Array, Rows, tuple[int, ...], int, np.random.RandomState], Array]


def segments(x: Array, rows: Rows, branching: tuple[int, ...], run: int, rng: np.random.RandomState) -> Array:
    """Cuts the rows along a principal axis of x at weighted quantiles; a tree cuts every block again.

    Run k cuts along the k-th axis.
    """
    del rng
    label = _cut_blocks(x, rows.weight, branching, lambda block, weight: _principal_axis(block, weight, run))
    return _soften(label, branching)


def random(x: Array, rows: Rows, branching: tuple[int, ...], run: int, rng: np.random.RandomState) -> Array:
    """Cuts inputs and targets at weighted quantiles along random directions."""
    joint = np.hstack([x, rows.y])
    label = _cut_blocks(
        joint, rows.weight, branching, lambda block, weight: np.asarray(rng.standard_normal(block.shape[1]))
    )
    return _soften(label, branching)


def subset(x: Array, rows: Rows, branching: tuple[int, ...], run: int, rng: np.random.RandomState) -> Array:
    """Fits each expert to just enough rows and gives every row to the expert with the smallest error."""
    z, num_experts = with_intercept(x), int(np.prod(branching))
    coef = []
    for _ in range(num_experts):
        chosen = _draw_rows(x, rows.weight, z.shape[1], rng)
        coef.append(least_squares(z[chosen], rows.y[chosen], np.ones((len(chosen), 1)), np.zeros(z.shape[1]))[0])
    error = ((rows.y[:, None, :] - predictions(z, np.stack(coef))) ** 2).sum(2)
    return _soften(error.argmin(1), branching)


def soft(x: Array, rows: Rows, branching: tuple[int, ...], run: int, rng: np.random.RandomState) -> Array:
    """Gentle random softmax of inputs and targets."""
    joint = np.hstack([x, rows.y])
    logits = joint @ rng.standard_normal((joint.shape[1], int(np.prod(branching)))) / np.sqrt(joint.shape[1])
    share = np.exp(logits - logits.max(1, keepdims=True))
    return share / share.sum(1, keepdims=True)


def kmeans(x: Array, rows: Rows, branching: tuple[int, ...], run: int, rng: np.random.RandomState) -> Array:
    """Twenty rounds of weighted k-means on inputs and targets from randomly drawn rows."""
    joint, num_experts = np.hstack([x, rows.y]), int(np.prod(branching))
    centers = joint[_draw_rows(joint, rows.weight, num_experts, rng)]
    for _ in range(20):
        label = ((joint**2).sum(1)[:, None] - 2 * joint @ centers.T + (centers**2).sum(1)).argmin(1)
        mass = rows.weight[:, None] * np.eye(num_experts)[label]
        total = mass.sum(0)
        centers = np.where(total[:, None] > 0, mass.T @ joint / np.maximum(total, 1e-300)[:, None], centers)
    return _soften(label, branching)


STARTS: dict[str, Starter] = {
    "segments": segments,
    "subset": subset,
    "random": random,
    "soft": soft,
    "kmeans": kmeans,
}


def _soften(label: Array, branching: tuple[int, ...]) -> Array:
    num_experts = int(np.prod(branching))
    return 0.98 * np.eye(num_experts)[label] + 0.02 / num_experts


def _cut_blocks(
    points: Array, weight: Array, branching: tuple[int, ...], axis: Callable[[Array, Array], Array]
) -> Array:
    label = np.zeros(len(points), dtype=np.int64)
    for children in branching:
        deeper = label * children
        for block in np.unique(label):
            inside = label == block
            score = points[inside] @ axis(points[inside], weight[inside])
            deeper[inside] += _quantile_bins(score, weight[inside], children)
        label = deeper
    return label


def _quantile_bins(score: Array, weight: Array, num_bins: int) -> Array:
    """Bins of about equal weight; equal scores always share a bin."""
    order = np.argsort(score, kind="stable")
    cumulative = np.cumsum(weight[order])
    edges = cumulative[-1] * np.arange(1, num_bins) / num_bins
    cuts = score[order][np.searchsorted(cumulative, edges * (1 - 1e-12))]
    slack = 1e-9 * max(float(np.abs(score).max()), 1e-300)
    return (score[:, None] > cuts + slack).sum(1)


def _principal_axis(points: Array, weight: Array, which: int) -> Array:
    centred = points - weight @ points / weight.sum()
    vectors = np.linalg.eigh(centred.T @ (weight[:, None] * centred))[1]
    axis = vectors[:, -1 - which % vectors.shape[1]]
    return axis * np.sign(axis[np.abs(axis).argmax()])


def _draw_rows(points: Array, weight: Array, count: int, rng: np.random.RandomState) -> Array:
    """Rows at random weighted quantiles of a random direction, so that repeated rows count as their weight."""
    score = points @ rng.standard_normal(points.shape[1])
    order = np.argsort(score, kind="stable")
    cumulative = np.cumsum(weight[order])
    at = np.searchsorted(cumulative, rng.random_sample(count) * cumulative[-1])
    return order[np.minimum(at, len(order) - 1)]
