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

        total_e = sum over calls of mean_t g[t, e];   if total_e - mean_j total_j > margin: g[., e] = 0
        and g is renormalised        Eigen et al. 2013, section 3

    A call is a minibatch: no total exceeds the mean by more than margin + 1. Totals are kept in a buffer, as a
    batch norm keeps its mean; recomputation in backward counts a call twice.

    Args:
        scorer: x -> logits.
        margin: lead that an expert may have, in calls; inf = no constraint.
        steps: calls after which the constraint is lifted; None = never.

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
        if self.training:
            self._count(weight.detach(), context)
        routing = SparseRouting.from_matrix(weight, keep)
        choice = torch.arange(self.num_experts, device=x.device).expand_as(weight)
        return Decision(routing, logits, probs, {**context_notes(context), "choice": choice, "kept": keep})

    def _allowed(self) -> Tensor:
        lifted = not self.training or (self.steps is not None and int(self.calls) >= self.steps)
        margin = math.inf if lifted else self.margin
        return self.total - self.total.mean() <= margin

    @torch.no_grad()
    def _count(self, weight: Tensor, context: Context) -> None:
        weight = weight if context.valid is None else weight[context.valid]
        if len(weight):
            self.total += weight.mean(0).to(self.total.dtype)
            self.calls += 1

    def extra_repr(self) -> str:
        return f"margin={self.margin}, steps={self.steps}"
