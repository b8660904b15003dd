"""Scorers: hidden states to one logit per expert."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moestro.routing.context import NO_CONTEXT, Context


class Scorer(nn.Module, ABC):
    """Scores every expert for every token: `x [tokens, width]` -> logits `[tokens, experts]`.

    Attributes:
        num_experts: number of experts.
        causal: whether later tokens cannot change the logits of earlier ones.
        batch_independent: whether a sequence's logits do not depend on the others of the batch.
    """

    num_experts: int
    causal: bool = True
    batch_independent: bool = True

    @abstractmethod
    def forward(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """The logits, in the precision of `x`."""


class Linear(Scorer):
    """One matrix, no bias: `logits = x W_g`, computed in the precision of `x`.

    Args:
        width: model width.
        num_experts: number of experts.
        std: standard deviation of the initial weights; 0 starts with every expert equal.

    Shapes: x `[tokens, width]` -> `[tokens, experts]`; weight `[experts, width]`.
    """

    def __init__(self, width: int, num_experts: int, std: float = 0.02) -> None:
        super().__init__()
        self.width, self.num_experts = width, num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        nn.init.zeros_(self.weight) if std == 0 else nn.init.trunc_normal_(self.weight, 0, std, -2 * std, 2 * std)

    def forward(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))

    def extra_repr(self) -> str:
        return f"width={self.width}, num_experts={self.num_experts}"


class Biased(Scorer):
    """Adds a learned bias per expert to the logits of a scorer: `logits = scorer(x) + b`.

    Args:
        scorer: the scorer inside.

    Shapes: bias `[experts]`, zero at the start.
    """

    def __init__(self, scorer: Scorer) -> None:
        super().__init__()
        self.scorer, self.num_experts = scorer, scorer.num_experts
        self.causal, self.batch_independent = scorer.causal, scorer.batch_independent
        self.bias = nn.Parameter(torch.zeros(scorer.num_experts))

    def forward(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        logits: Tensor = self.scorer(x, context)
        return logits + self.bias.to(logits.dtype)


class InputJitter(Scorer):
    """Multiplies what a scorer sees, and only that, by noise around one; in training only.

        logits = scorer(x * u),   u ~ U(1 - scale, 1 + scale)       Fedus et al. 2021, section 2.4 and table 11

    Args:
        scorer: the scorer inside.
        scale: half-width of the noise.

    Raises:
        ValueError: a scale outside 0 to 1.
    """

    def __init__(self, scorer: Scorer, scale: float = 1e-2) -> None:
        super().__init__()
        if not 0 <= scale < 1:
            raise ValueError(f"jitter={scale} must be at least 0 and below 1")
        self.scorer, self.scale = scorer, scale
        self.num_experts = scorer.num_experts
        self.causal, self.batch_independent = scorer.causal, scorer.batch_independent

    def forward(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        if self.training and self.scale:
            x = x * torch.empty_like(x).uniform_(1 - self.scale, 1 + self.scale)
        logits: Tensor = self.scorer(x, context)
        return logits

    def extra_repr(self) -> str:
        return f"scale={self.scale}"
