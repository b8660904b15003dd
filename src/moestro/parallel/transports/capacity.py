"""The exchange of equal shares: shapes, and with them bytes, do not depend on who goes where."""

from __future__ import annotations

import torch
from torch import Tensor

from moestro.parallel.network import Trip
from moestro.parallel.traffic import forward_phase
from moestro.parallel.transports.base import Transport, transport


@transport("capacity")
class StaticCapacity(Transport):
    """All-to-all of as many rows for every slot, filled up with zeros (Lepikhin et al. 2020, GShard).

        bytes to each rank = slots of a rank * capacity * width * bytes per number, whatever the load

    No counts travel, and with a fixed capacity nothing waits for them. The experts compute the empty rows too.

    Args:
        capacity: rows from one rank for one slot; None = what the fullest slot of any rank needs, so that nothing
            is lost (Hwang et al. 2022, Tutel's `capacity_factor=0`); that costs one number per rank, and a wait.

    Raises:
        ValueError: a capacity below 1, or at run, more rows for a slot than its capacity: let the router drop them.
    """

    def __init__(self, capacity: int | None = None) -> None:
        if capacity is not None and capacity < 1:
            raise ValueError(f"capacity={capacity} must be at least 1 row for a slot")
        self.capacity = capacity

    def carry(self, trip: Trip, rows: Tensor, load: Tensor) -> Tensor:
        wire, flat = trip.network.expert, load.flatten()
        capacity = self._capacity(trip, flat)
        position = torch.arange(len(rows), device=rows.device) - (flat.cumsum(0) - flat).repeat_interleave(flat)
        place = torch.arange(len(flat), device=rows.device).repeat_interleave(flat) * capacity + position
        bins = rows.new_zeros(len(flat) * capacity, rows.shape[1]).index_copy(0, place, rows)
        each = [load.shape[1] * capacity] * wire.size
        bins = trip.exchange(wire, bins, each, each, "dispatch")
        out = trip.compute(bins, torch.full_like(load, capacity))
        return trip.exchange(wire, out, each, each, "combine").index_select(0, place)

    def _capacity(self, trip: Trip, flat: Tensor) -> int:
        most = flat.max()
        if self.capacity is None:
            wire = trip.network.expert
            return int(wire.gather(most.view(1), [1] * wire.size, "counts", forward_phase()).max())
        if int(most) > self.capacity:
            raise ValueError(
                f"slot {int(flat.argmax())} gets {int(most)} rows but has capacity={self.capacity}; give the "
                "router a capacity that drops what is too much, or use capacity=None"
            )
        return self.capacity
