"""The plain exchange: every rank sends every other what it has for it."""

from __future__ import annotations

from torch import Tensor

from moestro.parallel.hop import Hop
from moestro.parallel.network import Trip
from moestro.parallel.transports.base import Transport, transport


@transport("linear")
class Linear(Transport):
    """Uneven all-to-all there and back (He et al. 2021, FastMoE).

    bytes to rank j = rows for it * width * bytes per number, in each of dispatch, combine and their gradients
    bytes of counts = 8 * slots of the group
    """

    def carry(self, trip: Trip, rows: Tensor, load: Tensor) -> Tensor:
        hop = Hop(trip, trip.network.expert, load)
        return hop.back(trip.compute(hop.there(rows), hop.arrived))
