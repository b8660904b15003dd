"""Sets of experts for all tokens, for visual ones and for text ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moestro.routers.base import Router, context_notes
from moestro.routers.ids import ids_of
from moestro.routers.scorers import Scorer
from moestro.routing import Context, Decision, SparseRouting


class ModalitySets(Router):
    """A softmax within each set of experts; the sets that take a token add up.

        y_t = sum over sets s that take t of sum_{e in s} softmax_s(z_t)_e f_e(x_t)
        Wu et al. 2023 (Omni-SMoLA)

    Args:
        scorer: x -> logits.
        sizes: experts in each set, in order; they must add up to all.
        takes: kinds of tokens (`Context.domain`) that each set takes; None = all.
        num_kinds: kinds of tokens.

    Raises:
        ValueError: sizes that do not add up to the experts.
    """

    def __init__(self, scorer: Scorer, sizes: Sequence[int], takes: Sequence[int | None], num_kinds: int) -> None:
        super().__init__()
        if sum(sizes) != scorer.num_experts or min(sizes) < 0:
            raise ValueError(f"sets of {list(sizes)} experts do not add up to the {scorer.num_experts} there are")
        self.scorer, self.sizes, self.takes, self.num_kinds = scorer, list(sizes), list(takes), num_kinds
        self.num_experts = self.top_k = scorer.num_experts

    def decide(self, x: Tensor, context: Context) -> Decision:
        kind = ids_of(context, "domain", self.num_kinds, "experts for kinds of tokens")
        logits = self.scorer(x, context)
        probs = torch.cat([part.softmax(-1) for part in logits.split(self.sizes, dim=1)], 1)
        takes = [torch.ones_like(kind, dtype=torch.bool) if only is None else kind == only for only in self.takes]
        keep = torch.cat([t.unsqueeze(1).expand(-1, size) for t, size in zip(takes, self.sizes, strict=True)], 1)
        keep = keep if context.valid is None else keep & context.valid.unsqueeze(1)
        choice = torch.arange(self.num_experts, device=x.device).expand_as(keep)
        notes = {**context_notes(context), "choice": choice, "wanted": keep, "kept": keep}
        return Decision(SparseRouting.from_matrix(probs * keep, keep), logits, probs, notes)

    def extra_repr(self) -> str:
        return f"sizes={self.sizes}, takes={self.takes}"
