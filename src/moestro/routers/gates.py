"""Gates: logits to scores, elementwise or over the experts."""

from __future__ import annotations

import math
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Standardised:
    """Softmax of logits that are standardised token by token.

        softmax(scale * (z - mean(z)) / std(z))        Wei et al. 2024 (Skywork-MoE), section 4.1

    The population standard deviation over the experts (the paper does not say which), plus epsilon.

    Attributes:
        scale: standard deviation of the standardised logits; larger is sharper.
        epsilon: keeps the quotient finite.
    """

    scale: float = 1.0
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        if self.scale <= 0:
            raise ValueError(f"scale={self.scale} of standardised logits must be above 0")

    def __call__(self, logits: Tensor) -> Tensor:
        """Shapes: `[tokens, experts]` -> the same."""
        centred = logits - logits.mean(-1, keepdim=True)
        spread = (centred.square().mean(-1, keepdim=True) + self.epsilon**2).sqrt()
        return (self.scale * centred / spread).softmax(-1)
