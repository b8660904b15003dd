"""One merged expert per segment, mixed by the segment before."""

from __future__ import annotations

import torch
from torch import Tensor

from moestro.routers.base import Router, context_notes
from moestro.routers.scorers import Scorer
from moestro.routing import Context, Decision, MergeRouting, SparseRouting
from moestro.routing.context import group_by_sequence


class SegmentMerging(Router):
    """Segments of a sequence, each served by a mixture that the one before it decides.

        e_k = softmax(W mean of segment k);   theta_k = sum_e e_{k-1}[e] theta_e,   theta_1 uses sg(e_1)
        Zhong et al. 2024 (Lory), section 2.2

    The first segment reads its own mean, later tokens of it too, without a gradient: not causal. Segments count
    valid tokens.

    Args:
        scorer: means `[segments, width]` -> logits.
        segment_length: tokens of a segment.

    Raises:
        ValueError: a segment without tokens.
    """

    causal = False
    top_k = 1

    def __init__(self, scorer: Scorer, segment_length: int = 256) -> None:
        super().__init__()
        if segment_length < 1:
            raise ValueError(f"segment_length={segment_length} must be at least 1")
        self.scorer, self.segment_length = scorer, segment_length
        self.num_experts = scorer.num_experts

    def decide(self, x: Tensor, context: Context) -> Decision:
        segment, per_sequence = self._segments(len(x), context, x.device)
        valid = torch.ones_like(segment, dtype=torch.bool) if context.valid is None else context.valid
        num_segments = int(segment.max()) // per_sequence * per_sequence + per_sequence if len(x) else 0
        total = x.new_zeros(num_segments, x.shape[1]).index_add(0, segment, x * valid.unsqueeze(1))
        count = x.new_zeros(num_segments).index_add(0, segment, valid.to(x.dtype))
        logits = self.scorer(total / count.clamp(min=1).unsqueeze(1), context)
        before = logits.view(-1, per_sequence, self.num_experts)
        before = torch.cat([before[:, :1].detach(), before[:, :-1]], 1).flatten(0, 1)
        mixture = before.softmax(-1)
        keep = None if context.valid is None else valid.unsqueeze(1)
        rows = SparseRouting.from_choice(segment.unsqueeze(1), x.new_ones(len(x), 1), num_segments, keep)
        routing = MergeRouting(mixture, rows)
        return Decision(routing, before[segment], mixture[segment], context_notes(context))

    def _segments(self, num_tokens: int, context: Context, device: torch.device) -> tuple[Tensor, int]:
        """Segment of every token, numbered through all sequences, and segments per sequence."""
        token, present, group = group_by_sequence(context.sequence, context.valid, num_tokens, device)
        place = (present.cumsum(1) - 1).clamp(min=0) // self.segment_length  # [sequences, longest]
        per_sequence = int(place.max()) + 1 if place.numel() else 1
        everyone = group_by_sequence(context.sequence, None, num_tokens, device)[1]
        segment = torch.zeros(num_tokens, dtype=torch.long, device=device)
        segment[token[everyone]] = place[everyone]
        return group * per_sequence + segment, per_sequence

    def extra_repr(self) -> str:
        return f"segment_length={self.segment_length}"
