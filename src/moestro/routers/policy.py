"""Routing as a policy that acts, is rewarded and learns."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moestro.routers.base import Router, context_notes
from moestro.routers.gate_networks import Affine
from moestro.routers.scorers import Scorer
from moestro.routing import Context, Decision, SparseRouting, top_k


class Policy(Router):
    """Samples one expert per token in training, takes the likeliest in evaluation.

        pi(e | x) = softmax(z)_e,   b(x) = x . v + c        Clark et al. 2022, section 3.3 (RL-R)

    Notes `value` `[tokens]`, the baseline b. `moestro.balance.policy.policy_loss` trains pi and b from rewards, and
    `moestro train` gives it every token's (objective `policy-gradient`).

    Args:
        scorer: x -> logits z.
        width: model width.
        weight: what the expert's output is multiplied by, its probability or one (no gradient from the task).
    """

    top_k = 1
    objective = "policy-gradient"

    def __init__(self, scorer: Scorer, width: int, weight: Literal["probability", "one"] = "probability") -> None:
        super().__init__()
        self.scorer, self.weight = scorer, weight
        self.num_experts = scorer.num_experts
        self.value = Affine(width, 1, std=0.0)

    def decide(self, x: Tensor, context: Context) -> Decision:
        logits = self.scorer(x, context)
        probs = logits.softmax(-1)
        if self.training and len(x):
            choice = torch.multinomial(probs.detach(), 1)
        else:
            choice = top_k(probs, 1)
        weight = probs.gather(1, choice) if self.weight == "probability" else torch.ones_like(probs[:, :1])
        keep = None if context.valid is None else context.valid.unsqueeze(1)
        routing = SparseRouting.from_choice(choice, weight, self.num_experts, keep)
        notes = {**context_notes(context), "choice": choice, "value": self.value(x.detach()).squeeze(1)}
        return Decision(routing, logits, probs, notes if keep is None else {**notes, "kept": keep})

    def extra_repr(self) -> str:
        return f"weight={self.weight!r}"
