"""No router at all: experts are drawn at random."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moestro.routers.base import Router, context_notes, shared_draw
from moestro.routers.fixed import mix
from moestro.routing import Context, Decision, SparseRouting

Level = Literal["token", "sentence"]


class RandomExpert(Router):
    """Training: one expert drawn for the whole call. Evaluation: one for each token or sentence.

        y_t = f_e(x_t),   e ~ U{0 .. E - 1}        Zuo et al. 2021 (THOR), section 3

    In training all ranks use the draw of rank 0. Evaluation draws by a hash of the token's id and position
    (`token`) or of its sequence (`sentence`), so that it can be repeated.

    Args:
        num_experts: number of experts.
        evaluate: what one draw of an evaluation serves.
        seed: of the evaluation's draws.
    """

    top_k = 1
    objective = "two-passes"

    def __init__(self, num_experts: int, evaluate: Level = "token", seed: int = 0) -> None:
        super().__init__()
        self.num_experts, self.level, self.seed = num_experts, evaluate, seed

    def decide(self, x: Tensor, context: Context) -> Decision:
        index = self._draw(len(x), context, x.device).unsqueeze(1)
        keep = None if context.valid is None else context.valid.unsqueeze(1)
        weight = torch.ones_like(index, dtype=x.dtype)
        routing = SparseRouting.from_choice(index, weight, self.num_experts, keep)
        notes = {**context_notes(context), "choice": index}
        return Decision(routing, notes=notes if keep is None else {**notes, "kept": keep})

    def _draw(self, num_tokens: int, context: Context, device: torch.device) -> Tensor:
        if self.training:
            return shared_draw(torch.randint(self.num_experts, (), device=device)).expand(num_tokens)
        if self.level == "sentence":
            who = "a draw for each sentence"
            drawn = mix(context.need("sequence", who), torch.full((), self.seed))
        else:
            who = "a draw for each token"
            place = mix(context.need("position", who), torch.full((), self.seed))
            drawn = mix(context.need("token_ids", who), place)
        return drawn % self.num_experts

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, evaluate={self.level!r}, seed={self.seed}"
