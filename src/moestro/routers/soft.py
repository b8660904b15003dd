"""Slots that read mixtures of tokens: nothing is selected, everything is weighted."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moestro.routers.base import Router, context_notes
from moestro.routing import Context, Decision, SoftRouting
from moestro.routing.context import group_by_sequence


class SoftSlots(Router):
    """Dispatch and combine by two softmaxes of one matrix of logits.

        l[t, s] = scale * x_t/|x_t| . mu_s/|mu_s|
        D = softmax of l over a sequence's tokens,   C = softmax of l over all slots
        u = D' x,   y = C f(u)        Puigcerver et al. 2023, section 2 and algorithm 1

    Every slot sees the whole sequence: not causal. Padding is left out of D and gets no output.

    Args:
        width: model width.
        num_experts: number of experts.
        slots_per_expert: slots of each expert and sequence.

    Parameters: slots `[experts, slots, width]` (normal, 1/sqrt(width)) and scale (1).
    """

    causal = False

    def __init__(self, width: int, num_experts: int, slots_per_expert: int = 1) -> None:
        super().__init__()
        if slots_per_expert < 1:
            raise ValueError(f"slots_per_expert={slots_per_expert} must be at least 1")
        self.num_experts, self.slots_per_expert = num_experts, slots_per_expert
        self.top_k = num_experts
        self.slots = nn.Parameter(torch.randn(num_experts, slots_per_expert, width) * width**-0.5)
        self.scale = nn.Parameter(torch.ones(()))

    def decide(self, x: Tensor, context: Context) -> Decision:
        token, present, _ = group_by_sequence(context.sequence, context.valid, len(x), x.device)
        unit = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
        slots = F.normalize(self.slots.to(x.dtype), dim=-1)
        logits = self.scale.to(x.dtype) * torch.einsum("tw,esw->tes", unit, slots)
        placed = logits[token]  # [groups, length, experts, slots]
        absent = ~present[:, :, None, None]
        dispatch = placed.masked_fill(absent, torch.finfo(x.dtype).min).softmax(1).masked_fill(absent, 0)
        combine = placed.flatten(2).softmax(-1).view_as(placed).masked_fill(absent, 0)
        routing = SoftRouting(token, dispatch.permute(0, 2, 3, 1), combine, len(x))
        probs = logits.flatten(1).softmax(-1).view_as(logits).sum(-1)
        return Decision(routing, logits.logsumexp(-1), probs, context_notes(context))

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, slots_per_expert={self.slots_per_expert}"
