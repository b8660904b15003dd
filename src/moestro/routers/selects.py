"""Selection rules: scores to the experts that each token wants."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from moestro.routers.base import Float32Buffers, check_top_k
from moestro.routing import Selection, top_k
from moestro.routing.context import NO_CONTEXT, Context


class Select(nn.Module, ABC):
    """A selection rule. Ties go to the expert of the lowest index.

    Attributes:
        k: choices per token, or a bound for them where they vary.
        average: choices per token on average; k unless a rule says otherwise.
        rivals: how many of a token's choices may meet in one expert's queue with others of other ranks; k unless
            each rank has experts of its own.
        causal: whether later tokens cannot change what earlier ones choose.
        causal_evaluation: whether that holds in evaluation at least.
        batch_independent: whether a sequence's choices do not depend on the others of the batch.
    """

    k: int
    average: float | None = None
    rivals: int | None = None
    causal: bool = True
    causal_evaluation: bool = False
    batch_independent: bool = True

    @abstractmethod
    def forward(self, scores: Tensor, context: Context = NO_CONTEXT) -> Selection:
        """Choose. Shapes: scores `[tokens, experts]` -> index `[tokens, k]`."""

    def check(self, num_experts: int) -> None:
        """Raise ValueError if this rule cannot choose among so many experts."""
        check_top_k(self.k, num_experts)


class TopK(Select):
    """The k experts of the highest scores."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, scores: Tensor, context: Context = NO_CONTEXT) -> Selection:
        check_top_k(self.k, scores.shape[-1])
        return Selection(top_k(scores, self.k))

    def extra_repr(self) -> str:
        return f"k={self.k}"


class GroupLimitedTopK(Select):
    """The k best experts within the few best groups of experts (node-limited routing).

        group score = sum of the `best_of` highest scores in the group;  others than the best groups get -inf
        DeepSeek-AI 2024 (V3, section 2.1.2: best_of = k / groups kept; V2: best_of = 1)

    Args:
        k: experts per token.
        num_groups: groups of consecutive experts.
        groups_kept: groups that a token may use.
        best_of: how many scores of a group make its score.

    Raises:
        ValueError: at `check`, groups that do not divide the experts or hold fewer than k in those kept.
    """

    def __init__(self, k: int, num_groups: int, groups_kept: int, best_of: int = 2) -> None:
        super().__init__()
        if not 1 <= groups_kept <= num_groups:
            raise ValueError(f"groups_kept={groups_kept} must be between 1 and num_groups={num_groups}")
        self.k, self.num_groups, self.groups_kept, self.best_of = k, num_groups, groups_kept, best_of

    def check(self, num_experts: int) -> None:
        super().check(num_experts)
        if num_experts % self.num_groups:
            raise ValueError(
                f"num_groups={self.num_groups} does not divide {num_experts} experts; choose a divisor"
            )
        reachable = num_experts // self.num_groups * self.groups_kept
        if self.k > reachable:
            raise ValueError(
                f"top_k={self.k} but {self.groups_kept} of {self.num_groups} groups hold {reachable} experts; "
                f"keep more groups or lower top_k"
            )

    def forward(self, scores: Tensor, context: Context = NO_CONTEXT) -> Selection:
        tokens, num_experts = scores.shape
        grouped = scores.view(tokens, self.num_groups, num_experts // self.num_groups)
        best = min(self.best_of, grouped.shape[-1])
        group_score = grouped.sort(dim=-1, descending=True).values[..., :best].sum(-1)
        kept = torch.zeros_like(group_score, dtype=torch.bool)
        kept.scatter_(1, top_k(group_score, self.groups_kept), True)
        return Selection(top_k(grouped.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(1), self.k))

    def extra_repr(self) -> str:
        return f"k={self.k}, num_groups={self.num_groups}, groups_kept={self.groups_kept}, best_of={self.best_of}"


class BiasedSelection(Float32Buffers, Select):
    """Adds a bias per expert to the scores, for choosing only; combine weights never see it.

        chosen = select(scores + b)        Wang et al. 2024 (loss-free balancing), eq. 3

    The bias is no parameter: a controller moves it after each step. It stays float32 when the model is cast,
    because a bfloat16 bias loses its small updates.

    Args:
        select: the rule inside.
        num_experts: number of experts.
    """

    bias: Tensor

    def __init__(self, select: Select, num_experts: int) -> None:
        super().__init__()
        self.select, self.k = select, select.k
        self.register_buffer("bias", torch.zeros(num_experts, dtype=torch.float32))

    def check(self, num_experts: int) -> None:
        self.select.check(num_experts)

    def forward(self, scores: Tensor, context: Context = NO_CONTEXT) -> Selection:
        return self.select(scores + self.bias.to(scores.dtype), context)


class RandomSecond(Select):
    """Keeps the second choice with probability `min(1, g2 / threshold)`, g2 its normalised score; in training only.

        g2 = p2 / (p1 + p2);   keep if u <= g2 / threshold, u ~ U(0, 1)
        Lepikhin et al. 2020, algorithm 1: threshold 1/2;   Zoph et al. 2022: threshold 0.2

    Evaluation keeps both.

    Args:
        select: a rule that makes two choices.
        threshold: score from which on the second choice is always kept.

    Raises:
        ValueError: a rule with another number of choices, or a threshold that is not above 0.
    """

    def __init__(self, select: Select, threshold: float = 0.5) -> None:
        super().__init__()
        if threshold <= 0:
            raise ValueError(f"threshold={threshold} of the second choice must be above 0")
        self.threshold = threshold
        if select.k != 2:
            raise ValueError(f"a random second choice needs a rule of two choices, got k={select.k}")
        self.select, self.k = select, 2

    def check(self, num_experts: int) -> None:
        self.select.check(num_experts)

    def forward(self, scores: Tensor, context: Context = NO_CONTEXT) -> Selection:
        chosen: Selection = self.select(scores, context)
        if not self.training:
            return chosen
        pair = scores.detach().gather(1, chosen.index)
        second = pair[:, 1] / (pair.sum(1) + 1e-9)
        keep = torch.ones_like(chosen.index, dtype=torch.bool)
        keep[:, 1] = torch.rand_like(second) <= second / self.threshold
        return chosen.restricted(keep)
