"""The weights of the hottest experts travel to all ranks for one step; all else is as in the plain exchange."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moestro.parallel.borrowed import Borrowed
from moestro.parallel.network import Network, Trip
from moestro.parallel.traffic import forward_phase
from moestro.parallel.transports.base import Transport, transport
from moestro.parallel.transports.data_centric import DataCentric
from moestro.parallel.transports.linear import Linear


@transport("shadow")
class Shadow(Transport):
    """Dynamic shadowing: rows of a hot expert stay at home, its weights come to them (He et al. 2022, FasterMoE).

        seconds(i shadows) = (3 t_c + 4 t_f) B_i + i t_m,   B_i = rows of the rank that is then the busiest
        t_c = 2 w / flops,   t_f = d b / bandwidth,   t_m = 2 w b / bandwidth   (there, and the gradient back)

    Decided anew in every call, from the loads of all ranks: the hottest expert of the busiest rank is shadowed
    while that makes the step shorter, so an even load has no shadow. With one expert on a rank these are the
    paper's latencies, the reduction of gradients counted. Weights are sent before rows; the paper overlaps them.

    bytes of an expert's owner = parameters of the expert * bytes per number * (ranks - 1), and as many of gradients
    come back; its rows are not sent. Counts: 8 * slots of the group, to every rank, besides those of `linear`.

    Args:
        flops: products and sums of a rank in a second.
        bandwidth: bytes in a second between two ranks.

    Raises:
        ValueError: speeds that are not above 0; at build, experts that are not stacked in tensors `[experts, ...]`.
    """

    def __init__(self, flops: float = 11.5e12, bandwidth: float = 50e9 / 8) -> None:
        if min(flops, bandwidth) <= 0:
            raise ValueError(f"flops={flops} and bandwidth={bandwidth} must be above 0")
        self.flops, self.bandwidth = flops, bandwidth

    def check(self, network: Network, experts: nn.Module) -> None:
        DataCentric.check_stacked(experts)

    def carry(self, trip: Trip, rows: Tensor, load: Tensor) -> Tensor:
        hot = self._chosen(trip, rows, load)
        if not hot:
            return Linear().carry(trip, rows, load)
        slot = torch.arange(load.numel(), device=rows.device).repeat_interleave(load.flatten())
        stays = torch.isin(slot, torch.tensor(hot, device=rows.device))
        near, far = stays.nonzero().squeeze(1), (~stays).nonzero().squeeze(1)
        weights = {name: self._sent(trip, p, hot) for name, p in trip.experts.named_parameters()}  # type: ignore[attr-defined]
        own = trip.with_experts(Borrowed(trip.experts, weights, num_experts=len(hot)))
        here = own.compute(rows.index_select(0, near), load.flatten()[hot].view(1, -1))
        others = load.flatten().index_fill(0, torch.tensor(hot, device=load.device), 0).view_as(load)
        there = Linear().carry(own.with_experts(trip.experts), rows.index_select(0, far), others)
        back = torch.empty_like(slot)
        back[torch.cat([near, far])] = torch.arange(len(slot), device=rows.device)
        return torch.cat([here, there]).index_select(0, back)

    def _chosen(self, trip: Trip, rows: Tensor, load: Tensor) -> list[int]:
        """Slots to shadow, the same on all ranks that hold the experts or slices of them, in order."""
        wire, slices = trip.network.expert, trip.network.tensor
        total = wire.gather(load.view(1, -1), [1] * wire.size, "counts", forward_phase()).sum(0, keepdim=True)
        if slices.size > 1:
            total = slices.gather(total, [1] * slices.size, "counts", forward_phase()).sum(0)
        parameters = list(trip.parameters())
        expert = sum(p.numel() for p in parameters) // load.shape[1]
        weight_bytes = sum(p.numel() * p.element_size() for p in parameters) // load.shape[1]
        row_bytes = rows.shape[1] * (trip.network.dtype or rows.dtype).itemsize
        row_seconds = 3 * 2 * expert / self.flops + 4 * row_bytes / self.bandwidth
        return shadowed(total.view_as(load).tolist(), row_seconds, 2 * weight_bytes / self.bandwidth)

    @staticmethod
    def _sent(trip: Trip, parameter: Tensor, hot: Sequence[int]) -> Tensor:
        """The rows of a parameter for the shadowed slots of all ranks, `[shadows, ...]`."""
        wire, slots = trip.network.expert, len(parameter)
        sizes = [sum(slot // slots == rank for slot in hot) for rank in range(wire.size)]
        own = [slot % slots for slot in hot if slot // slots == wire.rank]
        return trip.gather(wire, parameter[own], sizes, "experts", exact=True)


def shadowed(load: Sequence[Sequence[int]], row_seconds: float, shadow_seconds: float) -> list[int]:
    """The slots that are worth a shadow, in order.

    Args:
        load: rows of every slot of every rank, from all ranks.
        row_seconds: of a row that is computed elsewhere.
        shadow_seconds: of a shadow.
    """
    left, per_rank = [list(rank) for rank in load], len(load[0])
    ranks = range(len(left))
    chosen: list[int] = []
    seconds = row_seconds * max(map(sum, left))
    while True:
        busiest = max(ranks, key=lambda rank: sum(left[rank]))
        hottest = left[busiest].index(max(left[busiest]))
        rows, left[busiest][hottest] = left[busiest][hottest], 0
        shorter = row_seconds * max(map(sum, left)) + (len(chosen) + 1) * shadow_seconds
        if not rows or shorter >= seconds:
            return sorted(chosen)
        chosen.append(busiest * per_rank + hottest)
        seconds = shorter
