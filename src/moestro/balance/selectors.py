"""A loss that makes soft selectors choose (Hazimeh et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from moestro.balance.counts import noted
from moestro.balance.loss import TokenMean
from moestro.routing import Decision


class SelectorEntropy(TokenMean):
    """Summed entropy of the selectors, plus a push back to real experts where codes name more than there are.

    sum_j -sum_e r_j(e) log(r_j(e) + 1e-6)   [+ sum_j 1 / sum_e r_j(e)   if E is no power of two]
    Hazimeh et al. 2021, section 3.2 and appendix; averaged over tokens
    """

    def each(self, decision: Decision) -> Tensor:
        """Raises ValueError for a decision of another router."""
        selectors = noted(decision, "selectors")  # [tokens, k, experts]
        loss = -(selectors * (selectors + 1e-6).log()).sum((1, 2))
        num_experts = selectors.shape[-1]
        if num_experts & (num_experts - 1):
            loss = loss + (1 / selectors.sum(-1).clamp(min=torch.finfo(selectors.dtype).eps)).sum(1)
        return loss


selector_entropy = SelectorEntropy()
