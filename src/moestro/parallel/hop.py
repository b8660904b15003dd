"""One leg of a journey: rows to the ranks of one group, and later back."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from moestro.parallel.network import Trip
from moestro.parallel.wire import Wire


class Hop:
    """Tells every rank how many rows to expect, once; then carries rows there and back.

    Args:
        trip: the call.
        wire: group of ranks.
        load: rows of each block to send, `[ranks, ...]`; blocks are in this order, rank by rank.

    Attributes:
        arrived: rows of each block that came, `[ranks, ...]`, in the order in which they lie.
    """

    def __init__(self, trip: Trip, wire: Wire, load: Tensor) -> None:
        self._trip, self._wire = trip, wire
        self.arrived = trip.counts(wire, load.contiguous())
        shape = (len(load), prod(load.shape[1:]))
        self._send, self._receive = torch.stack([load.reshape(shape), self.arrived.view(shape)]).sum(2).tolist()

    def there(self, rows: Tensor) -> Tensor:
        """Bring rows, grouped as `load` says; they lie as `arrived` says."""
        return self._trip.exchange(self._wire, rows, self._send, self._receive, "dispatch")

    def back(self, rows: Tensor) -> Tensor:
        """Bring back what became of the rows, in the order in which they were sent."""
        return self._trip.exchange(self._wire, rows, self._receive, self._send, "combine")
