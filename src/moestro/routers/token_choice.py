"""Tokens choose experts: six slots that cover most papers."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from moestro.routers.base import Router, context_notes
from moestro.routers.capacities import Capacity, Dropless
from moestro.routers.noises import NoNoise
from moestro.routers.scorers import Scorer
from moestro.routers.selects import Select
from moestro.routing import Context, Decision, Selection, SparseRouting

Gate = Callable[[Tensor], Tensor]
Weigh = Callable[[Tensor, Tensor, Selection], Tensor]


class TokenChoice(Router):
    """Each token picks its experts.

        logits = scorer(x)                       [tokens, experts]
        noisy  = noise(x, logits)                training only
        probs  = gate(noisy)
        chosen = select(probs)                   Selection, [tokens, k]
        weight = weigh(noisy, probs, chosen)     [tokens, k]
        kept   = capacity(chosen, weight)        who is dropped; weights stay as they are

    Scorer, noise, select and capacity also see the context. Padding (`Context.valid` False) is taken out before
    capacity, so it fills no slot.

    Args:
        scorer: (x `[tokens, width]`, Context) -> logits `[tokens, experts]`; has `num_experts`.
        select: (scores, Context) -> Selection; has `k`.
        gate: logits -> probs.
        weigh: (noisy logits, probs, Selection) -> combine weights `[tokens, k]`.
        noise: (x, logits, Context) -> (noisy logits, notes).
        capacity: (Selection, weights `[tokens, k]`, number of experts, Context) -> Selection.

    Raises:
        ValueError: more choices than experts.
    """

    def __init__(
        self,
        scorer: Scorer,
        select: Select,
        gate: Gate,
        weigh: Weigh,
        noise: nn.Module | None = None,
        capacity: Capacity | None = None,
    ) -> None:
        super().__init__()
        self.scorer = scorer
        self.noise = noise or NoNoise()
        self.gate = gate
        self.select = select
        self.weigh = weigh
        self.capacity = capacity or Dropless()
        self.num_experts = scorer.num_experts
        select.check(self.num_experts)
        self.top_k = select.k if select.average is None else select.average
        rivals = select.k if select.rivals is None else select.rivals
        self.causal = scorer.causal and select.causal and self.capacity.causal(rivals)
        evaluates = select.causal or select.causal_evaluation
        self.causal_evaluation = scorer.causal and evaluates and self.capacity.causal_evaluation(rivals)
        parts = (scorer, select, self.capacity)
        self.batch_independent = all(part.batch_independent for part in parts)

    def decide(self, x: Tensor, context: Context) -> Decision:
        logits = self.scorer(x, context)
        noisy, notes = self.noise(x, logits, context)
        probs = self.gate(noisy)
        chosen: Selection = self.select(probs, context)
        weight = self.weigh(noisy, probs, chosen)
        wanted, valid = chosen.keep, context.valid
        chosen = chosen.restricted(None if valid is None else valid.unsqueeze(1))
        kept = self.capacity(chosen, weight, self.num_experts, context)
        routing = SparseRouting.from_choice(kept.index, weight, self.num_experts, kept.keep)
        notes = {**context_notes(context), **notes, "choice": chosen.index}
        notes |= {} if wanted is None else {"wanted": wanted}
        notes |= {} if kept.keep is None else {"kept": kept.keep}
        return Decision(routing, logits, probs, notes)
