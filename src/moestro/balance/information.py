"""Losses that make experts informative: what a choice tells about the token."""

from __future__ import annotations

import torch
from torch import Tensor

from moestro.balance.counts import valid_tokens
from moestro.routing import Decision


def token_information(decision: Decision) -> Tensor:
    """Minus the mutual information of token and expert: experts used evenly, tokens decided clearly.

        -I(e; x) = -H(mean_t p_t) + mean_t H(p_t)        Shen et al. 2023 (ModuleFormer); Pan et al. 2024 (DS-MoE)

    From -log E (each token sure, all experts alike) to 0 (every token alike).

    Raises:
        ValueError: a decision without probabilities.
    """
    if decision.probs is None:
        raise ValueError("mutual information needs router probabilities, but this router has none")
    valid = valid_tokens(decision, len(decision.probs)).unsqueeze(1)
    total = valid.sum().clamp(min=1)
    mean = (decision.probs * valid).sum(0) / total
    return (_entropy(decision.probs) * valid.squeeze(1)).sum() / total - _entropy(mean)


def _entropy(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p.clamp(min=torch.finfo(p.dtype).tiny)).sum(-1)
