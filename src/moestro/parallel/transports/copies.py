"""Where several ranks hold the same tokens, each sends a share of them."""

from __future__ import annotations

from torch import Tensor, nn

from moestro.parallel.blocks import block_order, parts_of, permuted
from moestro.parallel.network import Network, Trip
from moestro.parallel.transports.base import TokenTransport, Transport, make_transport, transport


@transport("drop-copies")
class DropCopies(Transport):
    """Ranks with the same tokens divide the rows among themselves before they travel, and gather the results.

        bytes of the transport inside = those without, divided by the copies
        bytes among the copies = results of own rows there, gradients of own rows back, to each other copy

    Duplicate token dropping (Singh et al. 2023, DeepSpeed-TED): for dense parts that tensor parallelism spreads
    over `copies` ranks. Every slot's rows are divided, so that the load stays as even as it was.

    Args:
        inside: the transport that carries the share, or its name.

    Raises:
        ValueError: one that knows tokens, or a mesh without copies.
    """

    drops_copies = True

    def __init__(self, inside: str | Transport = "linear") -> None:
        self.inside = make_transport(inside)
        if isinstance(self.inside, TokenTransport):
            raise ValueError("copies are dropped row by row; take a transport of rows inside, e.g. 'linear'")

    def check(self, network: Network, experts: nn.Module) -> None:
        if network.mesh.shape.copies == 1:
            raise ValueError("every rank of this mesh has tokens of its own (copies=1): there is nothing to drop")
        self.inside.check(network, experts)

    def carry(self, trip: Trip, rows: Tensor, load: Tensor) -> Tensor:
        wire = trip.network.copies
        parts = parts_of(load, wire.size)
        order = block_order(parts.permute(1, 2, 0), (2, 0, 1))
        sizes = parts.sum((1, 2)).tolist()
        own = trip.take_share(wire, permuted(rows, order), sizes, "copies")
        out = self.inside.carry(trip, own, parts[wire.rank])
        return permuted(trip.join_shares(wire, out, sizes, "copies"), order, inverse=True)
