"""Dense gating that keeps experts from running ahead of the others."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moestro.routers.base import Float32Buffers, Router, context_notes
from moestro.routers.scorers import Scorer
from moestro.routing import Context, Decision, SparseRouting


class OverloadGuard(Float32Buffers, Router):
    """A dense softmax, from which experts with too much past weight are left out; in training only.

        total_e = sum over steps of mean_t g[t, e];   if total_e - mean_j total_j > margin: g[., e] = 0
        and g is renormalised        Eigen et al. 2013, section 3

    A step is a minibatch: no total exceeds the mean by more than margin + 1. The controller
    `moestro.balance.overload.CountCarried` adds to the totals after each step, over micro-batches and ranks, so
    that what is recomputed in backward neither counts twice nor decides otherwise.

    Args:
        scorer: x -> logits.
        margin: lead that an expert may have, in steps; inf = no constraint.
        steps: steps after which the constraint is lifted; None = never.

    Raises:
        ValueError: a margin that is not above 0, or steps without a margin to lift.
    """

    total: Tensor
    calls: Tensor

    def __init__(self, scorer: Scorer, margin: float = math.inf, steps: int | None = None) -> None:
        super().__init__()
        if margin <= 0:
            raise ValueError(f"margin={margin} must be above 0")
        if steps is not None and margin == math.inf:
            raise ValueError(f"steps={steps} has no effect without a margin; pass one or leave steps out")
        self.scorer, self.margin, self.steps = scorer, margin, steps
        self.num_experts = self.top_k = scorer.num_experts
        self.register_buffer("total", torch.zeros(self.num_experts))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def decide(self, x: Tensor, context: Context) -> Decision:
        logits = self.scorer(x, context)
        probs = logits.softmax(-1)
        allowed = self._allowed()
        weight = probs * allowed
        weight = weight / weight.sum(-1, keepdim=True)
        keep = allowed.expand_as(weight)
        keep = keep if context.valid is None else keep & context.valid.unsqueeze(1)
        routing = SparseRouting.from_matrix(weight, keep)
        choice = torch.arange(self.num_experts, device=x.device).expand_as(weight)
        return Decision(routing, logits, probs, {**context_notes(context), "choice": choice, "kept": keep})

    def _allowed(self) -> Tensor:
        lifted = not self.training or (self.steps is not None and int(self.calls) >= self.steps)
        margin = math.inf if lifted else self.margin
        return self.total - self.total.mean() <= margin

    def extra_repr(self) -> str:
        return f"margin={self.margin}, steps={self.steps}"
