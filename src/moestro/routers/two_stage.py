"""A router that is distilled into a smaller one, which then stays as it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.routers.base import Router, context_notes
from moestro.routers.capacities import Capacity
from moestro.routers.ids import ids_of
from moestro.routing import Context, Decision, Selection, SparseRouting, top_k


class TwoStage(Router):
    """First a greedy router learns and teaches a table of word embeddings; then the table decides, frozen.

        s = x . e,   s' = u_id . e'        u: embeddings of token ids
        stage 1: expert = argmax s;   stage 2 and evaluation: expert = argmax s';   weight = sigmoid(s_expert)
        Dai et al. 2022 (StableMoE), section 3

    With the residual connection around the layer this is `h + sigmoid(s) FFN(h)`, the paper's mix of expert and
    identity. Stage 1 notes `taught` `[tokens, experts]`, the logits s', for the distillation loss.

    Args:
        width: model width.
        num_experts: number of experts.
        vocab_size: token ids.
        light_width: of the word embeddings.
        updates: optimiser steps of stage 1.
        capacity: who is dropped.

    Attributes:
        step: optimiser steps so far, moved by `moestro.balance.steps.CountSteps`.
    """

    top_k = 1
    step: Tensor

    def __init__(
        self, width: int, num_experts: int, vocab_size: int, light_width: int, updates: int, capacity: Capacity
    ) -> None:
        super().__init__()
        self.num_experts, self.updates, self.capacity = num_experts, updates, capacity
        self.causal, self.batch_independent = capacity.causal(1), capacity.batch_independent
        self.centroid = nn.Parameter(nn.init.orthogonal_(torch.empty(num_experts, width), 0.1))
        self.embedding = nn.Parameter(torch.randn(vocab_size, light_width))
        self.light_centroid = nn.Parameter(nn.init.orthogonal_(torch.empty(num_experts, light_width), 0.1))
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def decide(self, x: Tensor, context: Context) -> Decision:
        logits = x @ self.centroid.t().to(x.dtype)
        ids = ids_of(context, "token_ids", len(self.embedding), "a router of token ids")
        light = self.embedding.to(x.dtype)[ids] @ self.light_centroid.t().to(x.dtype)
        teaching = self.training and int(self.step) < self.updates
        chosen = Selection(top_k(logits if teaching else light, 1).detach())
        weight = logits.gather(1, chosen.index).sigmoid()
        chosen = chosen.restricted(None if context.valid is None else context.valid.unsqueeze(1))
        kept = self.capacity(chosen, weight, self.num_experts, context)
        routing = SparseRouting.from_choice(kept.index, weight, self.num_experts, kept.keep)
        notes = {**context_notes(context), "choice": kept.index}
        notes |= {"taught": light} if teaching else {}
        notes |= {} if kept.keep is None else {"kept": kept.keep}
        return Decision(routing, logits, logits.sigmoid(), notes)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, vocab_size={len(self.embedding)}, updates={self.updates}"
