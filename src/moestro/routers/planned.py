"""Selection by a plan over all tokens; combine weights stay those of the scores."""

from __future__ import annotations

import torch
from torch import Tensor

from moestro.routers.plans import sinkhorn
from moestro.routers.selects import Select
from moestro.routing import Selection
from moestro.routing.context import NO_CONTEXT, Context


class SinkhornSelection(Select):
    """Lets a rule choose among the rows of a transport plan, in which experts have equal shares.

        chosen = select(plan),   plan = sinkhorn(log scores): rows sum to 1, columns to T / E        Liu et al. 2024

    The plan is over the valid tokens of the call, later ones too: not causal.

    Args:
        select: the rule inside.
        iterations: rounds of scaling.
    """

    causal = False
    batch_independent = False

    def __init__(self, select: Select, iterations: int = 20) -> None:
        super().__init__()
        self.select, self.k, self.iterations = select, select.k, iterations

    def check(self, num_experts: int) -> None:
        self.select.check(num_experts)

    def forward(self, scores: Tensor, context: Context = NO_CONTEXT) -> Selection:
        places = slice(None) if context.valid is None else context.valid
        logits = scores.detach().clamp(min=torch.finfo(scores.dtype).tiny).log()
        plan = torch.zeros_like(scores, dtype=torch.float64)
        plan[places] = sinkhorn(logits[places], self.iterations).exp()
        chosen: Selection = self.select(plan, context)
        return chosen

    def extra_repr(self) -> str:
        return f"iterations={self.iterations}"
