"""Routers that mix the parameters of experts instead of their outputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moestro.routers.base import Router, context_notes
from moestro.routing import Context, Decision, MergeRouting, SparseRouting
from moestro.routing.context import group_by_sequence


class SequenceMerging(Router):
    """One merged expert per sequence, mixed by the sequence's mean token.

        v = mean over the sequence's valid tokens of x_t
        z_e = LN(v) . LN(embedding_e) / sqrt(width),   p = softmax(z)
        theta = sum_e p_e theta_e        Muqeeth et al. 2023 (SMEAR), section 3

    In training each p_e is dropped with probability `expert_dropout`, then
    `p = (p + 1e-6) / sum(p + 1e-6)`. The mean sees later tokens: not causal.

    Args:
        width: model width.
        num_experts: number of experts.
        expert_dropout: probability that an expert is left out of a sequence's mixture.

    Parameters: embedding `[experts, width]`, normal with standard deviation 0.02. The released code starts at
    zero, where the layer norm multiplies the first gradients by 1/sqrt(epsilon).
    """

    causal = False

    def __init__(self, width: int, num_experts: int, expert_dropout: float = 0.1) -> None:
        super().__init__()
        if not 0 <= expert_dropout < 1:
            raise ValueError(f"expert_dropout={expert_dropout} must be at least 0 and below 1")
        self.num_experts, self.expert_dropout = num_experts, expert_dropout
        self.top_k = 1
        self.embedding = nn.Parameter(torch.randn(num_experts, width) * 0.02)

    def decide(self, x: Tensor, context: Context) -> Decision:
        token, present, group = group_by_sequence(context.sequence, context.valid, len(x), x.device)
        count = present.sum(1, keepdim=True).clamp(min=1)
        mean = (x[token] * present.unsqueeze(-1)).sum(1) / count  # [groups, width]
        width = x.shape[-1:]
        embedding = F.layer_norm(self.embedding.to(x.dtype), width)
        logits = F.layer_norm(mean, width) @ embedding.t() / width[0] ** 0.5
        probs = logits.softmax(-1)  # [groups, experts]
        mixture = self._dropped(probs)
        keep = None if context.valid is None else context.valid.unsqueeze(1)
        ones = x.new_ones(len(x), 1)
        rows = SparseRouting.from_choice(group.unsqueeze(1), ones, len(mixture), keep)
        return Decision(MergeRouting(mixture, rows), logits[group], probs[group], context_notes(context))

    def _dropped(self, probs: Tensor) -> Tensor:
        if not (self.training and self.expert_dropout):
            return probs
        probs = probs * (torch.rand_like(probs) >= self.expert_dropout) + 1e-6
        return probs / probs.sum(-1, keepdim=True)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, expert_dropout={self.expert_dropout}"
