"""Choosing one expert of each group, or drawing the last choices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.routers.selects import Select
from moestro.routing import Selection, top_k
from moestro.routing.context import NO_CONTEXT, Context


@dataclass(frozen=True)
class GroupSoftmax:
    """Softmax inside each group of consecutive experts: every group's probabilities sum to one (Yang et al. 2021).

    Attributes:
        num_groups: groups; must divide the number of experts.
    """

    num_groups: int

    def __call__(self, logits: Tensor) -> Tensor:
        """Shapes: `[tokens, experts]` -> the same."""
        return logits.unflatten(1, (self.num_groups, -1)).softmax(-1).flatten(1)


class OnePerGroup(Select):
    """The best expert of each group of consecutive experts (expert prototyping, Yang et al. 2021, section 3.2).

    Args:
        num_groups: groups, and so choices per token.

    Raises:
        ValueError: at `check`, groups that do not divide the experts.
    """

    rivals = 1  # an expert only ever gets choices of its group's rank

    def __init__(self, num_groups: int) -> None:
        super().__init__()
        self.k = num_groups

    def check(self, num_experts: int) -> None:
        super().check(num_experts)
        if num_experts % self.k:
            raise ValueError(f"prototypes={self.k} does not divide {num_experts} experts; choose a divisor")

    def forward(self, scores: Tensor, context: Context = NO_CONTEXT) -> Selection:
        grouped = scores.unflatten(1, (self.k, -1))
        first = torch.arange(self.k, device=scores.device) * grouped.shape[-1]
        return Selection(top_k(grouped, 1).squeeze(-1) + first)


class SampledTail(Select):
    """The best experts, and in training a few drawn from the rest in proportion to their probabilities.

        the last r of k choices ~ multinomial(p without the first k - r)        Shen et al. 2023 (ModuleFormer)

    Args:
        k: experts per token.
        sampled: how many of them are drawn, r.

    Raises:
        ValueError: more drawn than chosen.
    """

    def __init__(self, k: int, sampled: int) -> None:
        super().__init__()
        if not 0 <= sampled <= k:
            raise ValueError(f"sampled={sampled} must be between 0 and top_k={k}")
        self.k, self.sampled = k, sampled

    def forward(self, scores: Tensor, context: Context = NO_CONTEXT) -> Selection:
        index = top_k(scores, self.k)
        if not self.training or not self.sampled or not len(scores):
            return Selection(index)
        first = index[:, : self.k - self.sampled]
        rest = scores.detach().scatter(1, first, 0) + torch.finfo(scores.dtype).tiny
        rest = rest.scatter(1, first, 0)
        return Selection(torch.cat([first, rest.multinomial(self.sampled)], 1))
