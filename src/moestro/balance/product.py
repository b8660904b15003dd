"""A balance by the product of shares, over all layers at once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from moestro.balance.counts import valid_tokens
from moestro.routing import Decision


def product_balance(decisions: Iterable[Decision]) -> Tensor:
    """Minus the logarithm of the product of the experts' mean shares; E log E when even, its least.

        -log prod_e q_e,   q_e = mean over layers and tokens of p[t, e]        Wu et al. 2024 (MoLE), eq. 7

    Args:
        decisions: of all layers; shares are averaged over layers before the product.

    Raises:
        ValueError: a decision without probabilities.
    """
    shares = []
    for decision in decisions:
        if decision.probs is None:
            raise ValueError("product balance needs router probabilities, but this router has none")
        valid = valid_tokens(decision, len(decision.probs)).unsqueeze(1)
        total = valid.sum()
        uniform = torch.full_like(decision.probs[:1], 1 / decision.probs.shape[1]) if not total else None
        mean = (decision.probs * valid).sum(0) / total.clamp(min=1)
        shares.append(mean if uniform is None else mean + uniform.sum(0))
    q = torch.stack(shares).mean(0)
    return -q.clamp(min=torch.finfo(q.dtype).tiny).log().sum()


def product_balance_of_layer(decision: Decision) -> Tensor:
    """`product_balance` of one layer alone, for `MoE(losses=...)`."""
    return product_balance([decision])
