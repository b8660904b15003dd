"""Gates: logits to scores, elementwise or over the experts."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def softmax(logits: Tensor) -> Tensor:
    """Softmax over the experts. Shapes: `[tokens, experts]` -> `[tokens, experts]`, rows sum to 1."""
    return logits.softmax(-1)


def sigmoid(logits: Tensor) -> Tensor:
    """Logistic function of each logit; experts do not compete. Shapes: `[tokens, experts]` -> the same."""
    return logits.sigmoid()


def relu(logits: Tensor) -> Tensor:
    """The positive part of each logit; experts do not compete. Shapes: `[tokens, experts]` -> the same."""
    return logits.relu()


class LearnedTemperature(nn.Module):
    """Softmax at a learned temperature: `softmax(logits / tau)`, tau = exp(log_tau) (Chi et al. 2022, section 3.2).

    Args:
        start: tau at first.

    Raises:
        ValueError: a temperature that is not above 0.
    """

    def __init__(self, start: float) -> None:
        super().__init__()
        if start <= 0:
            raise ValueError(f"temperature={start} must be above 0")
        self.log_tau = nn.Parameter(torch.tensor(math.log(start)))

    def forward(self, logits: Tensor) -> Tensor:
        return (logits / self.log_tau.to(logits.dtype).exp()).softmax(-1)
