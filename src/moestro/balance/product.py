"""A balance by the product of shares."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from moestro.balance.counts import probs_of
from moestro.balance.loss import Sums, TokenLoss, added
from moestro.routing import Decision


class ProductBalance(TokenLoss):
    """Minus the logarithm of the product of the experts' mean shares; E log E when even, its least.

        -log prod_e q_e,   q_e = mean over tokens of p[t, e]        Wu et al. 2024 (MoLE), eq. 7

    The paper's shares are means over all layers: `RoutingLog(model, layers="pooled")`, or `product_balance`.
    Without a valid token the shares are taken as even.
    """

    def terms(self, decision: Decision) -> dict[str, Tensor]:
        """Raises ValueError for a decision without probabilities."""
        return {"probs": probs_of(decision)}

    def value(self, sums: Sums) -> Tensor:
        tokens, probs = sums["tokens"].unsqueeze(-1), sums["probs"]
        q = probs / tokens.clamp(min=1) + (tokens == 0) / probs.shape[-1]
        return -q.clamp(min=torch.finfo(q.dtype).tiny).log().sum(-1)


product_balance_of_layer = ProductBalance()


def product_balance(decisions: Iterable[Decision]) -> Tensor:
    """`ProductBalance` of all layers at once: shares are averaged over layers before the product.

    Raises:
        ValueError: a decision without probabilities.
    """
    return product_balance_of_layer.value(added(product_balance_of_layer.sums(decision) for decision in decisions))
