"""Layouts between which a layer changes from call to call, because its weights lie the same in all of them."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from moestro.parallel.borrowed import Borrowed
from moestro.parallel.network import Network, Trip
from moestro.parallel.traffic import forward_phase
from moestro.parallel.transports.base import TokenTransport, Transport, make_transport, transport
from moestro.parallel.transports.data_centric import DataCentric


@transport("adaptive")
class Adaptive(Transport):
    """Rows travel to slices of experts, or slices to rows, whichever is less (Hwang et al. 2022, Tutel).

    Of `slices` ranks, each with a slice of the same experts (`tensor` of the mesh), groups of `slices / r` give
    each other their slices, and rows visit one rank of each of the `r` groups:

        r = slices      rows visit every slice, no weights travel (expert and tensor parallelism)
        r = 1           whole experts come together, rows stay (expert and data parallelism)
        r = 0           all experts of all ranks come together, rows do not travel at all (data parallelism)

    Every rank keeps its slice, whatever r is, so that changing it costs nothing. Bytes forward, and as many
    backward, see `bytes_of_degree`. Tutel measures candidates and keeps the fastest by capacity; here the fewest
    bytes decide, which every rank works out alike from the rows of all, at 8 bytes for each other rank.

    Args:
        inside: what carries rows between the ranks of `expert`, or its name; not used where r = 0.
        degree: r, for every call; None = that of the fewest bytes.

    Raises:
        ValueError: a transport inside that knows tokens, or at build, a degree that does not divide the slices, or
            experts that are not stacked in tensors `[experts, ...]`.

    Attributes:
        taken: how many calls took which degree, forward.
    """

    def __init__(self, inside: str | Transport = "linear", degree: int | None = None) -> None:
        self.inside, self.degree = make_transport(inside), degree
        if isinstance(self.inside, TokenTransport):
            raise ValueError("slices are joined for rows; take a transport of rows inside, e.g. 'linear'")
        self.taken: Counter[int] = Counter()
        self._all_travel = DataCentric()

    def check(self, network: Network, experts: nn.Module) -> None:
        degrees = degrees_of(network)
        if self.degree is not None and self.degree not in degrees:
            raise ValueError(
                f"degree={self.degree} does not fit {network.mesh.shape.tensor} slices; choose one of "
                f"{', '.join(map(str, degrees))}"
            )
        self._all_travel.check_stacked(experts)
        self.inside.check(network, experts)

    def carry(self, trip: Trip, rows: Tensor, load: Tensor) -> Tensor:
        degree = self._fewest_bytes(trip, rows) if self.degree is None else self.degree
        if forward_phase() == "forward":
            self.taken[degree] += 1
        trip = joined(trip, max(degree, 1))
        return (self.inside if degree else self._all_travel).carry(trip, rows, load)

    def _fewest_bytes(self, trip: Trip, rows: Tensor) -> int:
        network = trip.network
        total = torch.tensor([len(rows)], device=rows.device)
        for wire in (network.expert, network.tensor):
            total = wire.gather(total, [1] * wire.size, "counts", forward_phase()).sum(0, keepdim=True)
        ranks, slices = network.expert.size, network.tensor.size
        mean = int(total) / (ranks * slices)
        row = rows.shape[1] * (network.dtype or rows.dtype).itemsize
        weights = sum(p.numel() * p.element_size() for p in trip.parameters())
        return min(
            degrees_of(network),
            key=lambda degree: bytes_of_degree(degree, mean, row, weights, ranks, slices),
        )


def degrees_of(network: Network) -> list[int]:
    """The degrees that `Adaptive` can have there, in order."""
    slices = network.mesh.shape.tensor
    whole = [0] if network.mesh.node is not None else []
    return [*whole, *(degree for degree in range(1, slices + 1) if slices % degree == 0)]


def bytes_of_degree(degree: int, rows: float, row: int, weights: int, ranks: int, slices: int) -> float:
    """Bytes that a rank sends forward with a degree of `Adaptive`, where all send and get as many rows.

        r = 0      weights (ranks slices - 1)
        r >= 1     2 rows row ((ranks - 1) / ranks + r - 1) + weights (slices / r - 1)

    Args:
        degree: r.
        rows: of a rank.
        row: bytes of one.
        weights: bytes of a rank's share of the experts.
        ranks: over which experts are spread.
        slices: of each expert.
    """
    if degree == 0:
        return weights * (ranks * slices - 1)
    return 2 * rows * row * ((ranks - 1) / ranks + degree - 1) + weights * (slices // degree - 1)


def joined(trip: Trip, degree: int) -> Trip:
    """The same call with slices joined to `degree` larger ones; go on with what it returns only."""
    wire = trip.network.tensor
    together = wire.size // degree
    if together == 1:
        return trip
    first = wire.rank - wire.rank % together
    peers = range(first, first + together)
    bank = trip.experts
    weights = {}
    for name, p in bank.named_parameters():  # type: ignore[attr-defined]
        rows = p.movedim(bank.hidden_dims[name], 0)  # type: ignore[attr-defined]
        rows = trip.gather(wire, rows, [len(rows)] * wire.size, "experts", exact=True, peers=peers)
        weights[name] = rows.movedim(0, bank.hidden_dims[name]).contiguous()  # type: ignore[attr-defined]
    hidden = bank.hidden * together  # type: ignore[attr-defined]
    return trip.with_experts(
        Borrowed(bank, weights, hidden=hidden), range(wire.rank % together, wire.size, together)
    )
