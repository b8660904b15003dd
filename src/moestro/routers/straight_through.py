"""Router gradients that the ranking would cut off."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moestro.routers.base import Router, check_top_k, context_notes
from moestro.routers.scorers import Scorer
from moestro.routers.wrapped import Wrapped
from moestro.routing import Context, Decision, SparseRouting, top_k


class DenseGradient(Wrapped):
    """Runs every expert in training, so that the router learns from all; outputs stay those of the chosen ones.

        y = sum_(e in K) p_e f_e(x),   dL/dp_e = <dL/dy, f_e(x)> for every e        Yao et al. 2025 (DenseMixer)

    Experts that were not chosen carry weight exactly 0: they teach the router and learn nothing themselves.
    Training costs as much as a dense mixture; evaluation is unchanged.

    Args:
        router: weighs by raw probabilities and drops nothing.

    Notes `gradient_only` `[tokens, experts]`: pairs of weight zero.
    """

    def decide(self, x: Tensor, context: Context) -> Decision:
        decision: Decision = self.router.decide(x, context)
        if not self.training:
            return decision
        probs = decision.probs
        assert probs is not None
        index = top_k(probs, self.num_experts)
        idle = torch.ones_like(probs, dtype=torch.bool).scatter(1, decision.notes["choice"], False)
        weight = probs - (probs * idle).detach()
        keep = None if context.valid is None else context.valid.unsqueeze(1).expand_as(index)
        routing = SparseRouting.from_choice(index, weight.gather(1, index), self.num_experts, keep)
        return replace(decision, routing=routing, notes={**decision.notes, "gradient_only": idle})


class SparseMixer(Router):
    """Draws experts that come close to the best, and gives their weights the gradient of the mid-point rule.

        close: (max - z) / max(|z|, max) <= 2 epsilon,   p = softmax over the close ones
        training: e drawn from p, w = p_e (1/3 + 2/3 B), dw = dp_e,   B = 1 if e is the best one or with chance 1/4
        evaluation: e is the best one, w = p_e        Liu et al. 2023, sections 3-4

    For more than one expert the chosen one is taken out and the rest are handled alike.

    Args:
        scorer: hidden states to logits.
        k: experts per token.
        epsilon: half of the relative distance that counts as close.

    Raises:
        ValueError: more choices than experts, or an epsilon that is not above 0.
    """

    def __init__(self, scorer: Scorer, k: int, epsilon: float) -> None:
        super().__init__()
        if epsilon <= 0:
            raise ValueError(f"epsilon={epsilon} must be above 0: with 0 no second-best expert is ever drawn")
        self.scorer, self.epsilon = scorer, epsilon
        self.num_experts, self.top_k = scorer.num_experts, check_top_k(k, scorer.num_experts)
        self.causal, self.batch_independent = scorer.causal, scorer.batch_independent

    def decide(self, x: Tensor, context: Context) -> Decision:
        logits = self.scorer(x, context)
        left, chosen, weights = logits, [], []
        for _ in range(int(self.top_k)):
            index, weight = self._draw(left)
            left = left.scatter(1, index, -torch.inf)
            chosen.append(index)
            weights.append(weight)
        index, weight = torch.cat(chosen, 1), torch.cat(weights, 1)
        keep = None if context.valid is None else context.valid.unsqueeze(1).expand_as(index)
        routing = SparseRouting.from_choice(index, weight, self.num_experts, keep)
        notes = {**context_notes(context), "choice": index} | ({} if keep is None else {"kept": keep})
        return Decision(routing, logits, logits.softmax(-1), notes)

    def _draw(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """One expert per token and its weight, `[tokens, 1]` each."""
        close = logits.masked_fill(far_from_best(logits.detach(), self.epsilon), -torch.inf)
        p, best = close.softmax(-1), top_k(logits.detach(), 1)
        if not self.training:
            return best, p.gather(1, best)
        index = top_k(close.detach() - torch.empty_like(logits).exponential_().log(), 1)
        weight = p.gather(1, index)
        whole = (index == best) | (torch.rand_like(weight) > 0.75)
        return index, _ScaledForward.apply(weight, (1 + 2 * whole.to(weight.dtype)) / 3)

    def extra_repr(self) -> str:
        return f"k={self.top_k}, epsilon={self.epsilon}"


def far_from_best(logits: Tensor, epsilon: float) -> Tensor:
    """Entries further from the largest than 2 epsilon of the larger magnitude, `[..., experts]` bool."""
    best = logits.amax(-1, keepdim=True)
    return (best - logits) / torch.maximum(logits.abs(), best) > 2 * epsilon  # ties at 0 give NaN: not far


class _ScaledForward(torch.autograd.Function):
    """Scales a weight, but not its gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor) -> Tensor:
        return weight * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
