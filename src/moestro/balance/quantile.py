"""A selection bias that is solved for, not stepped towards."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from moestro.balance.controllers import Controller
from moestro.balance.counts import facts, valid_tokens
from moestro.layers import MoE
from moestro.routers import BiasedSelection
from moestro.routing import Decision


class QuantileBias(Controller):
    """Sets each expert's selection bias so that, the others unchanged, k/E of the tokens would have chosen it.

        margin[t, e] = (k-th best biased score of the others) - s[t, e];   e is chosen where b_e exceeds its margin
        b_e <- (1 - rate) b_e + rate * (k/E quantile over tokens of margin[t, e])

    After the quantile balancing of Megatron-LM (no paper). One move reaches what sign updates reach in many.
    Quantiles do not add up, so the margins of the step's tokens are kept until the update, `[tokens, experts]`; the
    bias keeps mean 0, which changes no choice.

    Args:
        select: the layer's biased selection.
        rate: share of the way to the solution; 1 may overshoot, as all experts move at once.
        group: process group whose tokens count together; None = this process alone.

    Raises:
        ValueError: a rate outside 0 to 1, or a selection of all experts, which no bias can change.
    """

    def __init__(self, select: BiasedSelection, rate: float = 0.5, group: dist.ProcessGroup | None = None) -> None:
        if not 0 < rate <= 1:
            raise ValueError(f"bias rate={rate} must be above 0 and at most 1")
        if select.k >= len(select.bias):
            raise ValueError(f"top_k={select.k} takes all {len(select.bias)} experts; a bias cannot act")
        self.select, self.rate, self.group = select, rate, group

    def measure(self, decision: Decision) -> Tensor:
        """Margins of the valid tokens, `[tokens, experts]`."""
        probs = facts(decision)[0].detach()
        scores, k = probs[valid_tokens(decision, len(probs))].double(), self.select.k
        biased = scores + self.select.bias.double()
        ranked = biased.sort(dim=1, descending=True).values
        threshold = torch.where(biased >= ranked[:, k - 1 : k], ranked[:, k : k + 1], ranked[:, k - 1 : k])
        return threshold - scores

    def join(self, before: Tensor, measured: Tensor) -> Tensor:
        return torch.cat([before, measured])

    @torch.no_grad()
    def update(self, moe: MoE, measured: Tensor) -> None:
        """Move the bias. Shapes: measured `[tokens, experts]`."""
        margins = gathered(measured, self.group)
        if not len(margins):
            return
        bias = self.select.bias.double()
        wanted = quantile(margins, self.select.k / margins.shape[1])
        bias = bias + self.rate * (wanted - bias)
        self.select.bias.copy_(bias - bias.mean())

    def __repr__(self) -> str:
        return f"QuantileBias(rate={self.rate})"


def quantile(rows: Tensor, share: float) -> Tensor:
    """The quantile of every column, linear between neighbours; `torch.quantile` takes at most 2^24 values."""
    place = share * (len(rows) - 1)
    ranked = rows.sort(dim=0).values
    low = int(place)
    return ranked[low].lerp(ranked[min(low + 1, len(rows) - 1)], place - low)


def gathered(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The rows of all ranks of a group, which may have different numbers of them; None = these rows alone."""
    if group is None:
        return rows
    ranks = dist.get_world_size(group)
    counts = rows.new_zeros(ranks, dtype=torch.long)
    counts[dist.get_rank(group)] = len(rows)
    dist.all_reduce(counts, group=group)
    padded = rows.new_zeros(int(counts.max()), rows.shape[1])
    padded[: len(rows)] = rows
    each = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(each, padded, group=group)
    return torch.cat([part[:n] for part, n in zip(each, counts.tolist(), strict=True)])
