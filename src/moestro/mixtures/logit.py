"""Weighted multinomial logit with soft targets: the M-step of softmax gates and of logistic experts."""

from __future__ import annotations

import numpy as np

from moestro.mixtures.numerics import (
    Array,
    row_max,
    row_sum,
    softmax_rows,
    solve_positive,
    upper_indices,
    weighted_gram,
)

_LARGEST_NEWTON = 300  # unknowns beyond which the constant bound is cheaper than the Hessian


def log_softmax(u: Array, coef: Array) -> Array:
    """Log-probabilities of a softmax whose last logit is 0.

    Shapes: u `[rows, features]`, coef `[classes - 1, features]` -> `[rows, classes]`.
    """
    logits = np.zeros((len(u), len(coef) + 1))
    np.matmul(u, coef.T, out=logits[:, :-1])
    logits -= row_max(logits)[:, None]
    logits -= np.log(row_sum(np.exp(logits)))[:, None]
    return logits


def coupling(num_classes: int) -> Array:
    """Turns a penalty on last-class-zero coefficients into the same penalty on all centred classes.

    `sum_c |w_c - mean w|² = sum_ij v_iᵀ K_ij v_j` with `K = I - 11ᵀ / classes`: relabelling changes nothing.
    """
    return np.eye(num_classes - 1) - 1.0 / num_classes


def penalty_value(coef: Array, couple: Array, ridge: Array) -> float:
    """`½ sum_ij K_ij sum_k ridge_k v_ik v_jk`."""
    return 0.5 * float(np.einsum("ij,ik,jk,k->", couple, coef, coef, ridge))


def fit_logit(
    u: Array,
    target: Array,
    weight: Array,
    coef: Array,
    couple: Array,
    ridge: Array,
    steps: int,
    solver: str = "newton",
    enough: float = 0.0,
) -> Array:
    """Raises `sum_t w_t sum_c target_tc log p_c(u_t) - ½ ridge` from the given coefficients; never lowers it.

    "newton" takes full Newton steps on all classes together, halved until the objective rises (Chen, Xu & Chi 1999
    show why the blocks between classes belong in the Hessian); "bound" replaces the Hessian by the constant
    `½ (I - 11ᵀ/classes) ⊗ sum_t w_t u_t u_tᵀ` that dominates it (Böhning & Lindsay 1988), which needs no halving.

    Args:
        steps: most steps to take.
        enough: stop when a step promises less than this gain.

    Shapes: u `[rows, features]`, target `[rows, classes]` with rows that sum to 1, weight `[rows]`,
    coef `[classes - 1, features]`, couple `[classes - 1, classes - 1]`, ridge `[features]`.
    """
    if coef.size == 0:
        return coef
    bound = solver == "bound" or coef.size > _LARGEST_NEWTON
    if bound:
        curvature = np.kron(coupling(len(coef) + 1) / 2, weighted_gram(u, weight[:, None])[0])
        curvature += np.kron(couple, np.diag(ridge))
    weighted_target = weight[:, None] * target
    log_p = log_softmax(u, coef)
    value = float(np.vdot(weighted_target, log_p)) - penalty_value(coef, couple, ridge)
    for _ in range(steps):
        p = np.exp(log_p[:, :-1])
        slope = (weighted_target[:, :-1] - weight[:, None] * p).T @ u - couple @ coef * ridge
        if not bound:
            curvature = _curvature(u, weight, p, couple, ridge)
        step = solve_positive(curvature, slope.ravel()).reshape(coef.shape)
        promise = 0.5 * float(np.vdot(step, slope))
        if promise <= max(enough, 1e-14 * (1.0 + abs(value))):
            break
        for halving in range(31):
            tried = coef + step * 0.5**halving
            tried_log_p = log_softmax(u, tried)
            tried_value = float(np.vdot(weighted_target, tried_log_p)) - penalty_value(tried, couple, ridge)
            if tried_value >= value:
                break
        else:
            return coef
        coef, log_p, value = tried, tried_log_p, tried_value
    return coef


def _curvature(u: Array, weight: Array, p: Array, couple: Array, ridge: Array) -> Array:
    """Negative Hessian, `[(classes - 1) * features]` squared: one Gram matrix for each pair of classes."""
    free = p.shape[1]
    first, second = upper_indices(free)
    same = first == second

    def pairs(rows: slice) -> Array:
        block = p[rows]
        pair = -block[:, first] * block[:, second]
        pair[:, same] += block
        return pair * weight[rows, None]

    gram = weighted_gram(u, pairs)
    blocks = np.empty((free, free, u.shape[1], u.shape[1]))
    blocks[first, second] = gram
    blocks[second, first] = gram
    blocks += couple[:, :, None, None] * np.diag(ridge)
    return blocks.transpose(0, 2, 1, 3).reshape(free * u.shape[1], -1)


def class_shares(u: Array, coef: Array) -> Array:
    """Probabilities of the classes. Shapes as `log_softmax`."""
    logits = np.zeros((len(u), len(coef) + 1))
    logits[:, :-1] = u @ coef.T
    return softmax_rows(logits)[1]
