"""Selections that take as many experts as they like: all, or all above a score; and weights that are all one."""

from __future__ import annotations

import torch
from torch import Tensor

from moestro.routers.selects import Select
from moestro.routing import Selection
from moestro.routing.context import NO_CONTEXT, Context


class EveryExpert(Select):
    """All experts serve every token: the gate alone decides how much each one counts.

    Args:
        num_experts: number of experts.
    """

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.k = num_experts

    def forward(self, scores: Tensor, context: Context = NO_CONTEXT) -> Selection:
        return Selection(torch.arange(self.k, device=scores.device).expand(len(scores), self.k))

    def extra_repr(self) -> str:
        return f"num_experts={self.k}"


class Above(Select):
    """All experts whose score is above a threshold, best first; none if no score is.

        K_t = {e : s[t, e] > threshold}

    Args:
        num_experts: number of experts.
        threshold: score to exceed; 0 leaves out what a mask has put at zero.
    """

    def __init__(self, num_experts: int, threshold: float = 0.0) -> None:
        super().__init__()
        self.k, self.threshold = num_experts, threshold

    def forward(self, scores: Tensor, context: Context = NO_CONTEXT) -> Selection:
        ranked = scores.sort(dim=-1, descending=True, stable=True)
        return Selection(ranked.indices, ranked.values > self.threshold)

    def extra_repr(self) -> str:
        return f"num_experts={self.k}, threshold={self.threshold}"


class TrainEvaluate(Select):
    """One rule for training, another for evaluation; `k` is that of evaluation.

    Args:
        train: rule in training.
        evaluate: rule in evaluation.
    """

    def __init__(self, train: Select, evaluate: Select) -> None:
        super().__init__()
        self.train_rule, self.evaluate_rule, self.k = train, evaluate, evaluate.k
        self.causal = train.causal and evaluate.causal
        self.batch_independent = train.batch_independent and evaluate.batch_independent

    def check(self, num_experts: int) -> None:
        self.train_rule.check(num_experts)
        self.evaluate_rule.check(num_experts)

    def forward(self, scores: Tensor, context: Context = NO_CONTEXT) -> Selection:
        rule = self.train_rule if self.training else self.evaluate_rule
        chosen: Selection = rule(scores, context)
        return chosen


def ones(logits: Tensor, probs: Tensor, chosen: Selection) -> Tensor:
    """Weight one for every choice: the gate only selects. Shapes: `[tokens, experts]` -> `[tokens, k]`."""
    return torch.ones_like(chosen.index, dtype=probs.dtype)
