"""Capacities and weights that mask at random: regularisation, not limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moestro.routers.capacities import Capacity, DropByPosition, place_in_line
from moestro.routing import Context, Selection


class DropAtRandom(DropByPosition):
    """Random token selection: in training, an expert that overflows keeps a uniformly random part of its tokens.

        kept with probability slots / n_e, wherever a token stands        Kim et al. 2021 (Z-code M3)

    Evaluation drops by position, so that it can be repeated.
    """

    def forward(self, chosen: Selection, weight: Tensor, num_experts: int, context: Context) -> Selection:
        if not self.training:
            return super().forward(chosen, weight, num_experts, context)
        order = torch.randperm(len(weight), device=weight.device)
        keep = None if chosen.keep is None else chosen.keep[order]
        place = torch.empty_like(chosen.index)
        place[order] = place_in_line(Selection(chosen.index[order], keep), num_experts)
        return chosen.restricted(place < self.slots(len(weight), num_experts, context))

    def causal(self, k: int) -> bool:
        return False

    def causal_evaluation(self, k: int) -> bool:
        return k == 1


class OutputMask(Capacity):
    """Leaves out what experts answer, pair by pair or token by token, with a probability; in training only.

        pairs (EOM) or whole tokens (FOM) count 0 with probability p, others are not rescaled
        NLLB team 2022, section 6.2.1; put `ScaledInEvaluation(weigh, 1 - p)` beside it

    Args:
        capacity: drops first.
        probability: p.
        whole_token: all choices of a token at once (final output masking).

    Raises:
        ValueError: a probability outside 0 to 1.
    """

    def __init__(self, capacity: Capacity, probability: float, whole_token: bool = False) -> None:
        super().__init__()
        if not 0 <= probability < 1:
            raise ValueError(f"a mask of probability {probability} must be at least 0 and below 1")
        self.capacity, self.probability, self.whole_token = capacity, probability, whole_token
        self.batch_independent = capacity.batch_independent

    def forward(self, chosen: Selection, weight: Tensor, num_experts: int, context: Context) -> Selection:
        kept: Selection = self.capacity(chosen, weight, num_experts, context)
        if not self.training:
            return kept
        shape = (len(weight), 1) if self.whole_token else tuple(weight.shape)
        return kept.restricted(torch.rand(shape, device=weight.device) >= self.probability)

    def causal(self, k: int) -> bool:
        return self.capacity.causal(k)

    def causal_evaluation(self, k: int) -> bool:
        return self.capacity.causal_evaluation(k)

    def extra_repr(self) -> str:
        return f"probability={self.probability}, whole_token={self.whole_token}"


class ScaledInEvaluation(nn.Module):
    """Multiplies weights by a constant in evaluation: what random masks leave over on average in training.

    Args:
        weigh: the rule inside.
        factor: the constant.
    """

    def __init__(self, weigh: Callable[[Tensor, Tensor, Selection], Tensor], factor: float) -> None:
        super().__init__()
        self.weigh, self.factor = weigh, factor

    def forward(self, logits: Tensor, probs: Tensor, chosen: Selection) -> Any:
        weight = self.weigh(logits, probs, chosen)
        return weight if self.training else weight * self.factor
