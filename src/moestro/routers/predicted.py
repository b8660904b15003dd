"""Expert choice that can generate: a small network learns from a token alone which experts will pick it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moestro.routers.base import Router
from moestro.routers.expert_choice import ExpertChoice
from moestro.routers.gate_networks import Affine
from moestro.routing import Context, Decision, SparseRouting


class PredictedChoice(Router):
    """Experts choose in training; in evaluation a token goes where it is expected to be picked.

        guess[t, e] = MLP(sg(x_t))_e,   evaluation: t goes to e where guess[t, e] > 0, weighted as in training
        the auxiliary predictor of Raposo et al. 2024, section 3.5, one per expert

    Training looks at later tokens, evaluation does not, and no longer at other sequences. `depth_loss` trains the
    guess, from notes `guess` (logits) and `picked` (bool), both `[tokens, experts]`. Only training is even.

    Args:
        router: experts that choose, weighing by their scores.
        width: model width.
    """

    causal = False
    causal_evaluation = True

    def __init__(self, router: ExpertChoice, width: int) -> None:
        super().__init__()
        self.router = router
        self.num_experts, self.top_k = router.num_experts, router.top_k
        hidden = max(width // 2, 1)
        self.inner, self.outer = Affine(width, hidden, width**-0.5), Affine(hidden, self.num_experts, hidden**-0.5)

    def decide(self, x: Tensor, context: Context) -> Decision:
        guess: Tensor = self.outer(self.inner(x.detach()).relu())
        decision = self.router.decide(x, context)
        routing, logits = decision.routing, decision.logits
        assert isinstance(routing, SparseRouting)
        assert logits is not None
        picked = torch.zeros_like(guess, dtype=torch.bool)
        picked[routing.token, routing.expert] = True
        if not self.training:
            passes = guess > 0 if context.valid is None else (guess > 0) & context.valid.unsqueeze(1)
            routing = SparseRouting.from_matrix(self.router.gate(logits), passes)
        return replace(decision, routing=routing, notes={**decision.notes, "guess": guess, "picked": picked})
