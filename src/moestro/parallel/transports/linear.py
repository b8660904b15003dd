"""The plain exchange: every rank sends every other what it has for it."""

from __future__ import annotations

import torch
from torch import Tensor

from moestro.parallel.network import Trip
from moestro.parallel.transports.base import Transport, transport


@transport("linear")
class Linear(Transport):
    """Uneven all-to-all there and back (He et al. 2021, FastMoE).

    bytes to rank j = rows for it * width * bytes per number, in each of dispatch, combine and their gradients;
    counts: 8 bytes per slot of the group
    """

    def carry(self, trip: Trip, rows: Tensor, load: Tensor) -> Tensor:
        wire = trip.network.expert
        arrived = trip.counts(wire, load)
        send, receive = torch.stack([load.sum(1), arrived.sum(1)]).tolist()
        rows = trip.exchange(wire, rows, send, receive, "dispatch")
        return trip.exchange(wire, trip.compute(rows, arrived), receive, send, "combine")
