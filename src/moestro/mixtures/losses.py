"""The three error functions of Jacobs et al. 1991 for gated outputs, with their derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from moestro.mixtures.numerics import Array, softmax_rows


class Loss(NamedTuple):
    """Errors `[rows]` and derivatives in gate logits `[rows, experts]` and outputs `[rows, experts, q]`."""

    value: Array
    by_logit: Array
    by_output: Array


def blend(logits: Array, outputs: Array, target: Array) -> Loss:
    """`|d - sum_i p_i o_i|²`: experts cooperate (Meta-Pi, Hampshire & Waibel 1989; Jacobs et al. 1991, eq. 1).

    Shapes: logits `[rows, experts]`, outputs `[rows, experts, q]`, target `[rows, q]`.
    """
    share = softmax_rows(logits)[1]
    mean = np.einsum("te,teq->tq", share, outputs)
    gap = target - mean
    pull = np.einsum("tq,teq->te", gap, outputs - mean[:, None])
    return Loss((gap**2).sum(1), -2 * share * pull, -2 * share[:, :, None] * gap[:, None])


def expected(logits: Array, outputs: Array, target: Array) -> Loss:
    """`sum_i p_i |d - o_i|²`: each expert is scored against the whole target (eq. 2). Shapes as `blend`."""
    share = softmax_rows(logits)[1]
    gap = target[:, None] - outputs
    square = (gap**2).sum(2)
    value = (share * square).sum(1)
    return Loss(value, share * (square - value[:, None]), -2 * share[:, :, None] * gap)


def mixture(logits: Array, outputs: Array, target: Array) -> Loss:
    """`-log sum_i p_i exp(-½ |d - o_i|²)`: experts compete (eq. 3). Shapes as `blend`.

    The constant `(q/2) log 2π` of the normal density is left out.
    """
    normaliser, share = softmax_rows(logits)
    gap = target[:, None] - outputs
    joint, posterior = softmax_rows(logits - 0.5 * (gap**2).sum(2))
    return Loss(normaliser - joint, share - posterior, -posterior[:, :, None] * gap)


LOSSES: dict[str, Callable[[Array, Array, Array], Loss]] = {
    "blend": blend,
    "expected": expected,
    "mixture": mixture,
}
