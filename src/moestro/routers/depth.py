"""Only some tokens of a sequence pass through a layer at all."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from moestro.routers.base import Router, context_notes
from moestro.routers.gate_networks import Affine
from moestro.routing import Context, Decision, SparseRouting, top_k
from moestro.routing.context import group_by_sequence


class Predictor(nn.Module):
    """A small network that guesses from a token alone whether it will be picked; no gradient into the token.

    Shapes: x `[tokens, width]` -> logits `[tokens]`.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = max(width // 2, 1)
        self.inner, self.outer = Affine(width, hidden, width**-0.5), Affine(hidden, 1, hidden**-0.5)

    def forward(self, x: Tensor, score: Tensor) -> Tensor:
        logits: Tensor = self.outer(self.inner(x.detach()).relu())
        return logits.squeeze(1)


class OwnScore(nn.Module):
    """The score itself is the guess, so that its sign learns to tell who is picked."""

    def forward(self, x: Tensor, score: Tensor) -> Tensor:
        return score


class MixtureOfDepths(Router):
    """Lets the top tokens of each sequence through, and another router place them.

        r_t = x_t . w;   training: the slots = capacity * length highest of a sequence, at least one
        y_t = r_t * sum_e a[t, e] f_e(x_t) for those, 0 for the others        Raposo et al. 2024, eq. 1

    Picking looks at later tokens; evaluation is causal: tokens pass whose guess is above 0. `depth_loss` trains the
    guess, from notes `guess` (logits) and `picked` (bool), both `[tokens]`.

    Args:
        width: model width.
        router: decides about the tokens that pass; a token-choice router.
        capacity: share of a sequence that passes.
        guess: (x, r) -> logits of passing.

    Raises:
        ValueError: a capacity that keeps nothing or more than all.
    """

    causal = False
    causal_evaluation = True

    def __init__(self, width: int, router: Router, capacity: float, guess: nn.Module) -> None:
        super().__init__()
        if not 0 < capacity <= 1:
            raise ValueError(f"capacity={capacity} is a share of the tokens; pass more than 0 and at most 1")
        self.router, self.capacity, self.guess = router, capacity, guess
        self.weight = nn.Parameter(torch.randn(width) * width**-0.5)
        self.num_experts, self.top_k = router.num_experts, capacity * router.top_k
        self.causal_evaluation = router.causal or router.causal_evaluation
        self.batch_independent = router.batch_independent

    def decide(self, x: Tensor, context: Context) -> Decision:
        score = x @ self.weight.to(x.dtype)
        guess = self.guess(x, score)
        picked = self._picked(score.detach(), context)
        passes = picked
        if not self.training:
            passes = guess > 0 if context.valid is None else (guess > 0) & context.valid
        inner = self.router.decide(x, replace(context, valid=passes))
        assert isinstance(inner.routing, SparseRouting)
        routing = replace(inner.routing, weight=inner.routing.weight * score[inner.routing.token])
        notes = {name: note for name, note in inner.notes.items() if name != "valid"}
        notes |= {**context_notes(context), "guess": guess, "picked": picked}
        notes["wanted"] = passes.unsqueeze(1).expand_as(inner.notes["choice"])
        return replace(inner, routing=routing, notes=notes)

    def _picked(self, score: Tensor, context: Context) -> Tensor:
        token, present, _ = group_by_sequence(context.sequence, context.valid, len(score), score.device)
        slots = (present.sum(1, keepdim=True) * self.capacity).long().clamp(min=1)
        order = top_k(score[token].masked_fill(~present, -torch.inf), token.shape[1])
        rank = order.argsort(1)
        picked = torch.zeros_like(score, dtype=torch.bool)
        picked[token[present]] = (rank < slots)[present]
        return picked

    def extra_repr(self) -> str:
        return f"capacity={self.capacity}"
