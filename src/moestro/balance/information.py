"""Losses that make experts informative: what a choice tells about the token."""

from __future__ import annotations

import torch
from torch import Tensor

from moestro.balance.counts import probs_of
from moestro.balance.loss import Sums, TokenLoss
from moestro.routing import Decision


class TokenInformation(TokenLoss):
    """Minus the mutual information of token and expert: experts used evenly, tokens decided clearly.

        -I(e; x) = -H(mean_t p_t) + mean_t H(p_t)        Shen et al. 2023 (ModuleFormer); Pan et al. 2024 (DS-MoE)

    From -log E (each token sure, all experts alike) to 0 (every token alike).
    """

    def terms(self, decision: Decision) -> dict[str, Tensor]:
        """Raises ValueError for a decision without probabilities."""
        probs = probs_of(decision)
        return {"entropy": _entropy(probs), "probs": probs}

    def value(self, sums: Sums) -> Tensor:
        tokens = sums["tokens"].clamp(min=1)
        return sums["entropy"] / tokens - _entropy(sums["probs"] / tokens.unsqueeze(-1))


token_information = TokenInformation()


def _entropy(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p.clamp(min=torch.finfo(p.dtype).tiny)).sum(-1)
