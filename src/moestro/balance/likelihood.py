"""Objectives of mixtures whose experts each make a prediction of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cooperative_loss(weight: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error of the mixed prediction.

        mean over rows of |target - sum_e g_e f_e|^2        Hampshire and Waibel 1989 (meta-pi)

    Shapes: weight `[rows, experts]`, prediction `[rows, experts, outputs]`, target `[rows, outputs]` -> scalar.
    """
    mixed = torch.einsum("te,teo->to", weight, prediction)
    return (target - mixed).square().sum(-1).mean()


def competitive_loss(log_weight: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    """Minus the log likelihood of a mixture of Gaussians, up to a constant: one expert need explain a row.

        mean over rows of -log sum_e g_e exp(-|target - f_e|^2 / 2)        Jacobs et al. 1991, eq. 1.3

    Shapes: log_weight `[rows, experts]` (log g), prediction `[rows, experts, outputs]`, target `[rows, outputs]`.
    """
    return -_joint(log_weight, prediction, target).logsumexp(-1).mean()


def responsibilities(log_weight: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    """Posterior probability that each expert made the target: `h_e = g_e N_e / sum_j g_j N_j`. `[rows, experts]`.

    Shapes: as for `competitive_loss`, whose gradients are `h_e (f_e - target)` and `g_e - h_e` (gate logits).
    """
    return _joint(log_weight, prediction, target).softmax(-1)


def task_weights(initial: Sequence[float], decay: Sequence[float], step: int) -> list[float]:
    """Weights of the tasks' losses at a step: `w_m(t) = w_m gamma_m^t`        Tang et al. 2020 (PLE), eq. 11"""
    return [weight * rate**step for weight, rate in zip(initial, decay, strict=True)]


def _joint(log_weight: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    return log_weight - 0.5 * (target.unsqueeze(1) - prediction).square().sum(-1)
