"""Experts choose tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from moestro.routers.base import Router, context_notes
from moestro.routers.scorers import Scorer
from moestro.routing import Context, Decision, SparseRouting, top_k


class ExpertChoice(Router):
    """Each expert picks its top tokens, so load is even by construction.

        S = softmax over experts (x W_g);  slots = T c / E;  I_e = top-slots tokens of column e
        y_t = sum over e that picked t of S[t, e] f_e(x_t)        Zhou et al. 2022, eqs. 1-3

    Looks at all tokens of the call, later ones too: neither causal nor independent of the batch. Slots are
    rounded down, at least one and at most all tokens. Padding is never picked.

    Args:
        scorer: `x [tokens, width]` -> logits `[tokens, experts]`; has `num_experts`.
        capacity_factor: experts per token, on average.

    Raises:
        ValueError: a capacity factor that is not above 0 or exceeds the number of experts.
    """

    causal = False
    batch_independent = False

    def __init__(self, scorer: Scorer, capacity_factor: float = 2.0) -> None:
        super().__init__()
        self.scorer, self.capacity_factor = scorer, capacity_factor
        self.num_experts = scorer.num_experts
        if not 0 < capacity_factor <= self.num_experts:
            raise ValueError(
                f"capacity_factor={capacity_factor} must be above 0 and at most the {self.num_experts} experts"
            )
        self.top_k = capacity_factor

    def decide(self, x: Tensor, context: Context) -> Decision:
        logits = self.scorer(x, context)
        probs = logits.softmax(-1)
        places = torch.arange(len(x), device=x.device) if context.valid is None else context.valid.nonzero()[:, 0]
        picked = top_k(probs.index_select(0, places).t(), self.slots(len(places)))  # [experts, slots]
        token = places[picked]
        weight = probs.t().gather(1, token)
        routing = SparseRouting.from_experts(token, weight, len(x))
        return Decision(routing, logits, probs, context_notes(context))

    def slots(self, num_tokens: int) -> int:
        """Tokens that each expert picks out of so many."""
        slots = int(num_tokens * self.capacity_factor / self.num_experts)
        return min(max(slots, 1), num_tokens)

    def extra_repr(self) -> str:
        return f"capacity_factor={self.capacity_factor}"
