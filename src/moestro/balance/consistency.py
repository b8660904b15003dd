"""Objectives that pull two passes over one batch together."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def symmetric_divergence(first: Tensor, second: Tensor, valid: Tensor | None = None) -> Tensor:
    """Half the sum of both divergences of two predictions, summed over tokens; gradients flow into both.

        1/2 [KL(p || q) + KL(q || p)] = 1/2 sum (p - q) (log p - log q)        Zuo et al. 2021 (THOR), eq. 4

    Zero if and only if the predictions are equal.

    Shapes: first and second are logits `[tokens, classes]`, valid `[tokens]` bool -> scalar.
    """
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    each = 0.5 * ((p.exp() - q.exp()) * (p - q)).sum(-1)
    return (each if valid is None else each * valid).sum()


def two_pass_objective(
    first: Tensor, second: Tensor, targets: Tensor, alpha: float = 1.0, valid: Tensor | None = None
) -> Tensor:
    """Training loss of two passes with independent draws, summed over tokens.

        CE(p) + CE(q) + alpha * symmetric divergence(p, q)        Zuo et al. 2021 (THOR), eq. 3

    Shapes: logits of the passes `[tokens, classes]`, targets `[tokens]` int64, valid `[tokens]` bool -> scalar.
    """
    each = F.cross_entropy(first, targets, reduction="none") + F.cross_entropy(second, targets, reduction="none")
    total = (each if valid is None else each * valid).sum()
    return total + alpha * symmetric_divergence(first, second, valid)
