"""A balance that wants half of the experts for one kind of data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.balance.counts import valid_tokens
from moestro.balance.loss import Loss, Sums
from moestro.routing import Decision
from moestro.routing.context import group_by_sequence


@dataclass(frozen=True)
class LocalisedBalance(Loss):
    """Squared variation of the experts' loads per sample, weighted by kind of data.

        Q[n, e] = sum over tokens of sample n of p[t, e];   I[n, e] = 1 + delta if e's half matches the type of n,
        else 1 - delta;   Z = I * Q;   loss = Var(Z) / (Mean(Z)^2 + 1e-10)        Dou et al. 2023 (LoRAMoE), eq. 9

    A sample is a sequence; its type is `Context.domain`, 0 or 1; type 1 matches the first half of the experts. The
    variance is the unbiased one, and the mean is squared, as in the released code (the paper has Var / Mean).
    Making Z even gives matching experts *less* load if delta is above 0: a negative delta gives them more.

    Attributes:
        delta: how much a match weighs.

    Raises:
        ValueError: delta outside -1 to 1.
    """

    delta: float = 0.1

    def __post_init__(self) -> None:
        if not -1 < self.delta < 1:
            raise ValueError(f"delta={self.delta} must be between -1 and 1")

    def sums(self, decision: Decision) -> dict[str, Tensor]:
        """Raises ValueError for a decision without probabilities, or without domains that are 0 or 1."""
        domain, probs = decision.notes.get("domain"), decision.probs
        if domain is None or probs is None:
            raise ValueError(
                "localised balance needs each sample's type, 0 or 1: call the layer with Context(domain=...)"
            )
        valid = valid_tokens(decision, len(probs))
        kind = domain.where(valid, 0)
        if bool(((kind != 0) & (kind != 1)).any()):
            raise ValueError(f"localised balance knows the types 0 and 1, got {int(kind.max())}")
        first_half = torch.arange(probs.shape[1], device=probs.device) < probs.shape[1] // 2
        match = first_half == (kind == 1).unsqueeze(1)  # [tokens, experts]
        weighted = probs * torch.where(match, 1 + self.delta, 1 - self.delta)
        token, present, _ = group_by_sequence(decision.notes.get("sequence"), valid, len(probs), probs.device)
        z = (weighted[token] * present.unsqueeze(-1)).sum(1)[present.any(1)]  # [samples, experts]
        return {"z": z.sum(), "squares": z.square().sum(), "loads": torch.tensor(z.numel(), device=z.device)}

    def value(self, sums: Sums) -> Tensor:
        loads = sums["loads"]
        mean = sums["z"] / loads.clamp(min=1)
        variance = (sums["squares"] - loads * mean.square()) / (loads - 1).clamp(min=1)
        return variance / (mean.square() + 1e-10) * (loads > 1)
