"""From what a router of transformers answered to a Decision like those of our own layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moestro.balance import TokenLoss
from moestro.balance.loss import Sums
from moestro.hf.families import Family, FoundLayer
from moestro.hf.outputs import Reading
from moestro.hf.tokens import CallTokens
from moestro.hf.weighing import sigmoid, softmax
from moestro.routing import Decision, SparseRouting


@dataclass(frozen=True, eq=False)
class Heard:
    """One answer of a router, kept as it was; nothing is computed while the model runs.

    Computing inside the forward pass would change what activation checkpointing saves and recomputes.

    Attributes:
        layer: whose.
        output: the router's raw output.
        tokens: of the call.
        bias: copy of the selection bias at that time, or None.
        training: whether the router was in training mode.
        gradient: whether the model was called with gradient.
    """

    layer: FoundLayer
    output: Any
    tokens: CallTokens
    bias: Tensor | None
    training: bool
    gradient: bool = True

    def reading(self) -> Reading:
        """Logits, weights and choices; choices in order of preference."""
        family = self.layer.family
        reading = family.output.read(self.layer.router, self.output)
        return reading if family.in_order else _in_order(reading, scores(family, reading), self.bias)

    def decision(self) -> Decision:
        """The Decision.

        Raises:
            ValueError: the call's tokens are not those that the router saw.
        """
        reading = self.reading()
        num_tokens, num_experts = reading.logits.shape
        self._check(num_tokens)
        valid = self.tokens.valid
        kept = reading.keep if valid is None else _both(reading.keep, valid.unsqueeze(1).expand_as(reading.index))
        routing = SparseRouting.from_choice(
            reading.index, reading.weight, num_experts, kept, self.layer.family.output.scale
        )
        logits = reading.logits.to(torch.promote_types(reading.logits.dtype, torch.float32))
        return Decision(routing, logits, scores(self.layer.family, reading), self._notes(reading, kept))

    def _notes(self, reading: Reading, kept: Tensor | None) -> dict[str, Tensor]:
        count, groups = reading.logits.shape[1], self.layer.groups
        device = reading.logits.device
        notes = {
            "choice": reading.index,
            "kept": kept,
            "valid": self.tokens.valid,
            "sequence": self.tokens.sequence,
            "bias": self.bias,
            "group": None if groups is None else torch.arange(count, device=device) // (count // groups[0]),
        }
        return {name: note for name, note in notes.items() if note is not None}

    def _check(self, num_tokens: int) -> None:
        for note in (self.tokens.valid, self.tokens.sequence):
            if note is not None and len(note) != num_tokens:
                raise ValueError(
                    f"the router of {self.layer.name} saw {num_tokens} tokens but the call's mask speaks of "
                    f"{len(note)}; pass recording(valid=...) with one bool per token, [batch, length]"
                )


def scores(family: Family, reading: Reading) -> Tensor:
    """Scores after the gate, `[tokens, experts]`; of an unknown family, by the gate that explains its weights."""
    if family.weigh is not None:
        return family.gate(reading.logits)
    for gate in (softmax, sigmoid):
        probs = gate(reading.logits.detach())
        ratio = reading.weight.detach().float() / probs.gather(1, reading.index)
        if torch.allclose(ratio, ratio[:, :1].expand_as(ratio), rtol=0.05):
            return gate(reading.logits)
    raise ValueError(f"the weights of {family.block} follow neither a softmax nor a sigmoid of its logits")


def _in_order(reading: Reading, probs: Tensor, bias: Tensor | None) -> Reading:
    """Choices by falling score plus bias: many routers ask top-k for them unsorted."""
    wanted = probs.detach() if bias is None else probs.detach() + bias
    order = wanted.gather(1, reading.index).argsort(dim=-1, descending=True, stable=True)
    keep = None if reading.keep is None else reading.keep.gather(1, order)
    return Reading(reading.logits, reading.weight.gather(1, order), reading.index.gather(1, order), keep)


def _both(one: Tensor | None, other: Tensor) -> Tensor:
    return other if one is None else one & other


@dataclass(frozen=True)
class OfShares(TokenLoss):
    """A loss of scores that do not sum to one (sigmoid gates), taken of their shares.

        p[t, e] = s[t, e] / sum_j s[t, j]        DeepSeek-AI 2024 (V3), eq. 19; softmax scores stay as they are

    Attributes:
        loss: of decisions whose probabilities sum to one.
    """

    loss: TokenLoss

    def terms(self, decision: Decision) -> dict[str, Tensor]:
        """Raises ValueError for a decision without probabilities."""
        probs = decision.probs
        if probs is not None:
            probs = probs / probs.sum(-1, keepdim=True).clamp(min=torch.finfo(probs.dtype).tiny)
        return self.loss.terms(replace(decision, probs=probs))

    def value(self, sums: Sums) -> Tensor:
        return self.loss.value(sums)
