"""Tokens of different sequences share what an expert reads."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moestro.routers.base import Router, context_notes
from moestro.routers.scorers import Scorer
from moestro.routing import Context, Decision, SoftRouting
from moestro.routing.context import group_by_sequence

Emission = Literal["same", "experts"]


class TokenMixing(Router):
    """One mixture per expert of the tokens at the same place of several sequences.

        m[t, e] = softmax over the group's tokens of z[t, e] / tau
        u_e = sum_t m[t, e] x_t,   y_t = sum_e m[t, e] f_e(u_e)        Antoniak et al. 2023, section 3

    A group is one position of up to `group_size` sequences of the batch: later positions cannot reach back, but
    neighbours in the batch matter. Weights of a token need not sum to 1 over experts.

    Args:
        scorer: x -> logits.
        group_size: sequences that mix.
        temperature: tau, above 0.
        emission: `same` weights back, or a softmax over `experts`.

    Raises:
        ValueError: a temperature or a group size that cannot be; at call, `Context.position` is missing.
    """

    batch_independent = False

    def __init__(
        self, scorer: Scorer, group_size: int = 32, temperature: float = 1.0, emission: Emission = "same"
    ) -> None:
        super().__init__()
        if temperature <= 0 or group_size < 1:
            raise ValueError(
                f"temperature must be above 0 and group_size at least 1, got {temperature} and {group_size}"
            )
        self.scorer, self.group_size = scorer, group_size
        self.temperature, self.emission = temperature, emission
        self.num_experts = self.top_k = scorer.num_experts

    def decide(self, x: Tensor, context: Context) -> Decision:
        token, present, _ = group_by_sequence(self._group(len(x), context), context.valid, len(x), x.device)
        logits = self.scorer(x, context)
        placed, absent = logits[token] / self.temperature, ~present.unsqueeze(-1)  # [groups, length, experts]
        merge = placed.masked_fill(absent, torch.finfo(x.dtype).min).softmax(1).masked_fill(absent, 0)
        emit = merge if self.emission == "same" else placed.softmax(-1).masked_fill(absent, 0)
        routing = SoftRouting(token, merge.transpose(1, 2).unsqueeze(2), emit.unsqueeze(-1), len(x))
        return Decision(routing, logits, logits.softmax(-1), context_notes(context))

    def _group(self, num_tokens: int, context: Context) -> Tensor:
        position = context.need("position", "mixing tokens of one position")
        sequence = torch.zeros_like(position) if context.sequence is None else context.sequence
        there = sequence if context.valid is None else sequence[context.valid]
        known = there.unique()  # sequences without a valid token take no place
        rank = torch.searchsorted(known, sequence)
        return position * (num_tokens + 1) + rank // self.group_size

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}, temperature={self.temperature}, emission={self.emission!r}"
