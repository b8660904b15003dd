"""Exchanges in two levels, inside and between nodes: few large messages instead of many small ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.parallel.blocks import block_order, permuted
from moestro.parallel.hop import Hop
from moestro.parallel.network import Network, Trip
from moestro.parallel.transports.base import Transport, transport


@transport("two-level")
class TwoLevel(Transport):
    """First inside the node to the place that the destination has on its node, then across (Hwang et al. 2022).

        bytes between nodes as `linear`, in nodes - 1 messages per rank instead of (nodes - 1) * ranks per node

    Tutel's two-dimensional hierarchical all-to-all, for uneven shares: the counts travel in two levels too.
    """

    def check(self, network: Network, experts: nn.Module) -> None:
        _ = network.node

    def carry(self, trip: Trip, rows: Tensor, load: Tensor) -> Tensor:
        node, across = trip.network.node, trip.network.across
        by_rank = load.view(across.size, node.size, -1)  # [node, place, slot]
        by_place = block_order(by_rank, (1, 0, 2))
        inside = Hop(trip, node, by_rank.permute(1, 0, 2))
        by_node = block_order(inside.arrived, (1, 0, 2))  # from [source place, node, slot]
        between = Hop(trip, across, inside.arrived.permute(1, 0, 2))
        rows = inside.there(permuted(rows, by_place))
        rows = between.there(permuted(rows, by_node))
        out = trip.compute(rows, between.arrived.flatten(0, 1))
        out = permuted(between.back(out), by_node, inverse=True)
        return permuted(inside.back(out), by_place, inverse=True)


@transport("leader")
class Leader(Transport):
    """One rank of each node collects all rows, exchanges them with other nodes and deals out (Nie et al. 2022).

        bytes between nodes as `linear`, in nodes - 1 messages per node; the leader holds the rows of its whole node

    HetuMoE's hierarchical all-to-all, for machines that share one network card.
    """

    def check(self, network: Network, experts: nn.Module) -> None:
        _ = network.node

    def carry(self, trip: Trip, rows: Tensor, load: Tensor) -> Tensor:
        node, across = trip.network.node, trip.network.across
        to_leader = torch.zeros(node.size, *load.shape, dtype=load.dtype, device=load.device)
        to_leader[0] = load
        collect = Hop(trip, node, to_leader)
        held = collect.arrived.view(node.size, across.size, node.size, -1)  # [source place, node, place, slot]
        rows = collect.there(rows)
        if node.rank == 0:
            by_node = block_order(held, (1, 0, 2, 3))
            between = Hop(trip, across, held.permute(1, 0, 2, 3))
            rows = between.there(permuted(rows, by_node))
            held = between.arrived  # [source node, source place, place, slot]
        else:
            held = held.new_zeros(across.size, node.size, *held.shape[2:])
        by_place = block_order(held, (2, 0, 1, 3))
        deal = Hop(trip, node, held.permute(2, 0, 1, 3))
        rows = deal.there(permuted(rows, by_place))
        out = trip.compute(rows, deal.arrived[0].flatten(0, 1))  # all from the leader: [source node, source place]
        out = permuted(deal.back(out), by_place, inverse=True)
        if node.rank == 0:
            out = permuted(between.back(out), by_node, inverse=True)
        return collect.back(out)
