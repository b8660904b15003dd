"""Selections that take as many experts as a token needs; `Selection.keep` says which of the k bounds count."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moestro.routers.selects import Select, TopK
from moestro.routing import Selection, top_k
from moestro.routing.context import NO_CONTEXT, Context


class TopP(Select):
    """The fewest experts whose probabilities add up to more than a threshold.

        keep experts 1..n, n = first place where the cumulative sum of falling p exceeds the threshold
        Huang et al. 2024, eqs. 4-6; all are kept if no sum does

    A token never needs more than `floor(threshold * E) + 1` experts, which is k.

    Args:
        threshold: between 0 (the best expert) and 1 (all).
        num_experts: number of experts.

    Raises:
        ValueError: a threshold outside 0 to 1.
    """

    def __init__(self, threshold: float, num_experts: int) -> None:
        super().__init__()
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold={threshold} of cumulative probability must be between 0 and 1")
        self.threshold = threshold
        self.k = min(math.floor(threshold * num_experts + 1e-6) + 1, num_experts)

    def forward(self, scores: Tensor, context: Context = NO_CONTEXT) -> Selection:
        index = top_k(scores, self.k)
        ranked = scores.detach().gather(1, index)
        before = ranked.cumsum(1) - ranked  # probability of the better ones
        return Selection(index, before <= self.threshold)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}, k={self.k}"


class CloseSecond(TopK):
    """The second expert only where its probability comes close to the first.

        keep the second if p_1 - p_2 <= margin        Li et al. 2023, section 3

    Args:
        margin: between 0 (ties only) and 1 (always).

    Raises:
        ValueError: a margin outside 0 to 1.
    """

    def __init__(self, margin: float) -> None:
        super().__init__(k=2)
        if not 0 <= margin <= 1:
            raise ValueError(f"margin={margin} between two probabilities must be between 0 and 1")
        self.margin = margin

    def forward(self, scores: Tensor, context: Context = NO_CONTEXT) -> Selection:
        chosen = super().forward(scores, context)
        pair = scores.detach().gather(1, chosen.index)
        close = pair[:, 0] - pair[:, 1] <= self.margin
        return chosen.restricted(torch.stack([torch.ones_like(close), close], 1))


class Positive(Select):
    """Every expert whose score is above zero, best first (Wang et al. 2024, ReMoE, eq. 5).

    Args:
        num_experts: number of experts; all may be chosen.
        average: experts per token that a controller aims at.
    """

    def __init__(self, num_experts: int, average: float) -> None:
        super().__init__()
        self.k, self.average = num_experts, average

    def forward(self, scores: Tensor, context: Context = NO_CONTEXT) -> Selection:
        index = top_k(scores, self.k)
        return Selection(index, scores.detach().gather(1, index) > 0)
