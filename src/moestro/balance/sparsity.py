"""Losses about how many experts a token uses, how sharp the router is, and which experts are dear."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.balance.counts import chosen_by, facts, logits_of, probs_of
from moestro.balance.loss import Sums, TokenLoss, TokenMean
from moestro.routing import Decision


class RouterEntropy(TokenMean):
    """Mean entropy of a token's probabilities, in nats: low when few experts suffice.

    mean over tokens of -sum_e p_e log p_e        Huang et al. 2024, eq. 7
    """

    def each(self, decision: Decision) -> Tensor:
        """Raises ValueError for a decision without probabilities."""
        probs = probs_of(decision)
        return torch.special.entr(probs.clamp(min=torch.finfo(probs.dtype).tiny)).sum(-1)


router_entropy = RouterEntropy()


@dataclass(frozen=True)
class LoadWeightedL1(TokenLoss):
    """The size of non-negative scores, weighted by how busy each expert is.

        mean over tokens of sum_e f_e R(x_t)_e,   f_e = E / (k T) * tokens that use e
        Wang et al. 2024 (ReMoE), eqs. 7 and 11

    Attributes:
        top_k: experts per token aimed at, k.
    """

    top_k: float

    def terms(self, decision: Decision) -> dict[str, Tensor]:
        """Raises ValueError for a decision without probabilities or choices."""
        scores, choice, counted = facts(decision)
        return {"chosen": chosen_by(choice, counted, scores.shape[1], scores.dtype), "scores": scores}

    def value(self, sums: Sums) -> Tensor:
        tokens = sums["tokens"].clamp(min=1).unsqueeze(-1)
        f = sums["chosen"] * sums["chosen"].shape[-1] / (self.top_k * tokens)
        return (f * sums["scores"] / tokens).sum(-1)


@dataclass(frozen=True)
class DearExperts(TokenLoss):
    """Load times probability where every expert has a price of its own.

        sum_e price_e f_e P_e,   f_e = tokens that chose e / T        Jin et al. 2024 (MoE++), eq. 7

    Attributes:
        prices: one per expert.
    """

    prices: tuple[float, ...]

    def terms(self, decision: Decision) -> dict[str, Tensor]:
        """Raises ValueError for a decision without probabilities or choices."""
        probs, choice, counted = facts(decision)
        return {"chosen": chosen_by(choice, counted, probs.shape[1], probs.dtype), "probs": probs}

    def value(self, sums: Sums) -> Tensor:
        tokens, probs = sums["tokens"].clamp(min=1).unsqueeze(-1), sums["probs"]
        prices = torch.tensor(self.prices, dtype=probs.dtype, device=probs.device)
        return (prices * sums["chosen"] / tokens * probs / tokens).sum(-1)


@dataclass(frozen=True)
class AtTemperature(TokenLoss):
    """A balance loss whose probabilities are `softmax(logits / temperature)`, whatever the gate does.

        E * sum_e f_e P_e,   f from first choices        Chi et al. 2022, section 3.3

    Attributes:
        temperature: above 0.
    """

    temperature: float

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be above 0")

    def terms(self, decision: Decision) -> dict[str, Tensor]:
        """Raises ValueError for a decision without logits, probabilities or choices."""
        _, choice, counted = facts(decision)
        probs = (logits_of(decision) / self.temperature).softmax(-1)
        return {"chosen": chosen_by(choice[:, :1], counted[:, :1], probs.shape[1], probs.dtype), "probs": probs}

    def value(self, sums: Sums) -> Tensor:
        tokens = sums["tokens"].clamp(min=1).unsqueeze(-1)
        return sums["probs"].shape[-1] * (sums["chosen"] / tokens * sums["probs"] / tokens).sum(-1)
