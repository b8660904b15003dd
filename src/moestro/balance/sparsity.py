"""Losses about how many experts a token uses, how sharp the router is, and which experts are dear."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.balance.counts import count, counted_choices, facts
from moestro.routing import Decision


def router_entropy(decision: Decision) -> Tensor:
    """Mean entropy of a token's probabilities, in nats: low when few experts suffice.

        mean over tokens of -sum_e p_e log p_e        Huang et al. 2024, eq. 7

    Raises:
        ValueError: a decision without probabilities or choices.
    """
    probs, _, valid = facts(decision)
    entropy = torch.special.entr(probs.clamp(min=torch.finfo(probs.dtype).tiny)).sum(-1)
    return (entropy * valid).sum() / valid.sum().clamp(min=1)


@dataclass(frozen=True)
class LoadWeightedL1:
    """The size of non-negative scores, weighted by how busy each expert is.

        mean over tokens of sum_e f_e R(x_t)_e,   f_e = E / (k T) * tokens that use e
        Wang et al. 2024 (ReMoE), eqs. 7 and 11

    Attributes:
        top_k: experts per token aimed at, k.
    """

    top_k: float

    def __call__(self, decision: Decision) -> Tensor:
        """Raises ValueError for a decision without probabilities or choices."""
        scores, choice, valid = facts(decision)
        total = valid.sum().clamp(min=1)
        load = count(choice, counted_choices(decision, choice), scores.shape[1], scores.dtype)
        f = load * scores.shape[1] / (self.top_k * total)
        return (scores * valid.unsqueeze(1)).sum(0).mul(f).sum() / total


@dataclass(frozen=True)
class DearExperts:
    """Load times probability where every expert has a price of its own.

        sum_e price_e f_e P_e,   f_e = tokens that chose e / T        Jin et al. 2024 (MoE++), eq. 7

    Attributes:
        prices: one per expert.
    """

    prices: tuple[float, ...]

    def __call__(self, decision: Decision) -> Tensor:
        """Raises ValueError for a decision without probabilities or choices."""
        probs, choice, valid = facts(decision)
        total = valid.sum().clamp(min=1)
        load = count(choice, counted_choices(decision, choice), probs.shape[1], probs.dtype) / total
        prices = torch.tensor(self.prices, dtype=probs.dtype, device=probs.device)
        return (prices * load * (probs * valid.unsqueeze(1)).sum(0) / total).sum()


@dataclass(frozen=True)
class AtTemperature:
    """A balance loss whose probabilities are `softmax(logits / temperature)`, whatever the gate does.

        E * sum_e f_e P_e,   f from first choices        Chi et al. 2022, section 3.3

    Attributes:
        temperature: above 0.
    """

    temperature: float

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be above 0")

    def __call__(self, decision: Decision) -> Tensor:
        """Raises ValueError for a decision without logits, probabilities or choices."""
        _, choice, valid = facts(decision)
        if decision.logits is None:
            raise ValueError("this loss needs logits, but this router has none")
        probs, first = (decision.logits / self.temperature).softmax(-1), choice[:, :1]
        total = valid.sum().clamp(min=1)
        f = count(first, counted_choices(decision, choice)[:, :1], probs.shape[1], probs.dtype) / total
        return probs.shape[1] * (f * (probs * valid.unsqueeze(1)).sum(0) / total).sum()
