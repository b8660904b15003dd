"""A selection bias that is solved for, not stepped towards."""

from __future__ import annotations

import torch
from torch import Tensor

from moestro.balance.controllers import Controller
from moestro.balance.counts import facts
from moestro.layers import MoE
from moestro.routers import BiasedSelection
from moestro.routing import Decision


class QuantileBias(Controller):
    """Sets each expert's selection bias so that, the others unchanged, k/E of the tokens would have chosen it.

        margin[t, e] = (k-th best biased score of the others) - s[t, e];   e is chosen where b_e exceeds its margin
        b_e <- (1 - rate) b_e + rate * (k/E quantile over tokens of margin[t, e])

    After the quantile balancing of Megatron-LM (no paper). One move reaches what sign updates reach in many.
    Quantiles of micro-batches are averaged by their tokens; the bias keeps mean 0, which changes no choice.

    Args:
        select: the layer's biased selection.
        rate: share of the way to the solution; 1 may overshoot, as all experts move at once.

    Raises:
        ValueError: a rate outside 0 to 1, or a selection of all experts, which no bias can change.
    """

    def __init__(self, select: BiasedSelection, rate: float = 0.5) -> None:
        if not 0 < rate <= 1:
            raise ValueError(f"bias rate={rate} must be above 0 and at most 1")
        if select.k >= len(select.bias):
            raise ValueError(f"top_k={select.k} takes all {len(select.bias)} experts; a bias cannot act")
        self.select, self.rate = select, rate

    def measure(self, decision: Decision) -> Tensor:
        """Quantiles times tokens, and tokens, `[experts + 1]`."""
        probs, _, valid = facts(decision)
        scores, k = probs.detach()[valid].double(), self.select.k
        if not len(scores):
            return scores.new_zeros(scores.shape[1] + 1)
        biased = scores + self.select.bias.double()
        ranked = biased.sort(dim=1, descending=True).values
        threshold = torch.where(biased >= ranked[:, k - 1 : k], ranked[:, k : k + 1], ranked[:, k - 1 : k])
        wanted = (threshold - scores).quantile(k / scores.shape[1], dim=0)
        return torch.cat([wanted * len(scores), wanted.new_full((1,), len(scores))])

    @torch.no_grad()
    def update(self, moe: MoE, measured: Tensor) -> None:
        """Move the bias. Shapes: measured `[experts + 1]`."""
        measured = self.summed(measured)
        if not measured[-1]:
            return
        bias = self.select.bias.double()
        bias = bias + self.rate * (measured[:-1] / measured[-1] - bias)
        self.select.bias.copy_(bias - bias.mean())

    def __repr__(self) -> str:
        return f"QuantileBias(rate={self.rate})"
