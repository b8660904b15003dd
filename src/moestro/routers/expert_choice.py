"""Experts choose tokens: slots for what they compare, how they weigh, who competes and for how many places."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moestro.routers.base import Router, context_notes
from moestro.routers.gates import softmax
from moestro.routers.groups import Group, Share, Slots, WholeCall
from moestro.routers.scorers import Scorer
from moestro.routing import Context, Decision, SparseRouting, top_k

Gate = Callable[[Tensor], Tensor]
Affinity = Callable[[Tensor, int], Tensor]
Weigh = Callable[[Tensor, Tensor], Tensor]


def as_scored(scores: Tensor, slots: int) -> Tensor:
    """Experts compare the scores themselves. `[tokens, experts]`"""
    return scores


def raw_scores(scores: Tensor, picked: Tensor) -> Tensor:
    """Picked pairs weigh what they score. `[tokens, experts]`"""
    return scores


class ExpertChoice(Router):
    """Each expert picks its top tokens, so load is even by construction.

        S = gate(x W_g), softmax over experts;  slots = T c / E;  I_e = top-slots tokens of column e
        y_t = sum over e that picked t of S[t, e] f_e(x_t)        Zhou et al. 2022, eqs. 1-3

    Looks at all tokens of a group, later ones too: not causal. Padding is never picked.

    Args:
        scorer: (x `[tokens, width]`, Context) -> logits `[tokens, experts]`; has `num_experts`.
        slots: slots of an expert, or the experts per token on average (capacity factor).
        gate: logits -> scores.
        affinity: (scores of a group, slots) -> what experts compare, `[tokens, experts]`; gets no gradient.
        weigh: (scores of a group, picked pairs bool) -> combine weights, all `[tokens, experts]`.
        group: which tokens compete.

    Raises:
        ValueError: a capacity factor that is not above 0 or exceeds the number of experts.
    """

    causal = False

    def __init__(
        self,
        scorer: Scorer,
        slots: Slots | float = 2.0,
        *,
        gate: Gate = softmax,
        affinity: Affinity = as_scored,
        weigh: Weigh = raw_scores,
        group: Group | None = None,
    ) -> None:
        super().__init__()
        self.scorer, self.gate, self.affinity, self.weigh = scorer, gate, affinity, weigh
        self.num_experts = scorer.num_experts
        self.slots = slots if isinstance(slots, Slots) else Share(slots)
        self.group = group or WholeCall()
        self.top_k = self.slots.experts_per_token
        if not 0 < self.top_k <= self.num_experts:
            raise ValueError(
                f"capacity_factor={self.top_k} must be above 0 and at most the {self.num_experts} experts"
            )
        self.batch_independent = self.group.batch_independent

    def decide(self, x: Tensor, context: Context) -> Decision:
        logits = self.scorer(x, context)
        scores = self.gate(logits)
        keep, weight = torch.zeros_like(scores, dtype=torch.bool), torch.zeros_like(scores)
        expert = torch.arange(self.num_experts, device=x.device).unsqueeze(1)
        for places in self.group(context, len(x), x.device):
            own = scores.index_select(0, places)
            slots = self.slots(len(places), self.num_experts)
            affinity = self.affinity(own.detach(), slots)
            picked = torch.zeros_like(own, dtype=torch.bool)
            picked[top_k(affinity.t(), slots), expert] = True
            keep = keep.index_put((places,), picked)
            weight = weight.index_put((places,), self.weigh(own, picked))
        routing = SparseRouting.from_matrix(weight, keep)
        return Decision(routing, logits, logits.softmax(-1), context_notes(context))

    def extra_repr(self) -> str:
        return f"slots={self.slots}, group={type(self.group).__name__}"
