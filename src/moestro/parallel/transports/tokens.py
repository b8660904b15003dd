"""Transports that know tokens: each travels once to wherever several of its experts are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moestro.parallel.network import Network, Trip
from moestro.parallel.traffic import forward_phase
from moestro.parallel.transports.base import TokenTransport, transport
from moestro.parallel.wire import Wire


@dataclass(frozen=True)
class Pairs:
    """Which row goes to which slot, and with which weight its result comes back; grouped by slot.

    Attributes:
        row: row of each pair, `[pairs]`.
        slot: its slot, of those below the ranks that are still to be chosen between, `[pairs]`.
        weight: `[pairs]`, differentiable.
        scale: whether the weight multiplies results ("output") or rows ("input").
    """

    row: Tensor
    slot: Tensor
    weight: Tensor
    scale: str

    @classmethod
    def of(cls, token: Tensor, weight: Tensor, load: Tensor, scale: str) -> Pairs:
        """The pairs of a call; see `TokenTransport.carry_tokens`."""
        slots = torch.arange(load.numel(), device=load.device)
        return cls(token, slots.repeat_interleave(load.flatten(), output_size=len(token)), weight, scale)

    def sent(self, trip: Trip, wire: Wire, row: Tensor, slots: int, sizes: list[list[int]]) -> Pairs:
        """The pairs that other ranks send, after those of this rank have gone out.

        Args:
            trip: the call.
            wire: ranks, each with `slots` of the slots.
            row: row of each pair among those that its rank gets from here.
            slots: see wire.
            sizes: pairs to send to, pairs to receive and rows to receive from each rank.
        """
        send, receive, rows = sizes
        facts = torch.stack([row, self.slot % slots], 1)
        facts = wire.exchange(facts, send, receive, "pairs", forward_phase())
        weight = trip.exchange(wire, self.weight.unsqueeze(1), send, receive, "weights", exact=True).squeeze(1)
        first = torch.tensor([sum(rows[:rank]) for rank in range(wire.size)], device=row.device)
        source = first.repeat_interleave(torch.tensor(receive, device=row.device), output_size=len(facts))
        order = facts[:, 1].argsort(stable=True)
        return Pairs((facts[:, 0] + source)[order], facts[order, 1], weight.index_select(0, order), self.scale)

    def compute(self, trip: Trip, x: Tensor, slots: int) -> Tensor:
        """The experts of this rank, and the sum of what they return for each row of x."""
        rows = x.index_select(0, self.row)
        weight = self.weight.unsqueeze(1)
        if self.scale == "input":
            rows = rows * weight.to(rows.dtype)
        out = trip.compute(rows, torch.bincount(self.slot, minlength=slots).view(1, -1))
        if self.scale == "output":
            out = out * weight.to(out.dtype)
        return out.new_zeros(len(x), out.shape[1]).index_add(0, self.row, out)


@transport("deduplicated")
class Deduplicated(TokenTransport):
    """A token crosses to a node once, however many of its experts are there, and then to each rank once.

        bytes between nodes = width * bytes per number * (distinct other nodes that a token goes to, summed)
        bytes inside a node = likewise of ranks, for the tokens that came to this rank's place

    DeepSeek-AI 2024 (DeepEP): to the rank at the same place of the other node, which passes it on. Results are
    weighted where the expert is and added up on the rank, on the node and at home; so weights (and pairs of row and
    slot, 16 bytes) travel too. With one node there is one level. Sums are in another order than at home.
    """

    def check(self, network: Network, experts: nn.Module) -> None:
        _ = network.node

    def carry_tokens(
        self, trip: Trip, x: Tensor, token: Tensor, weight: Tensor, load: Tensor, scale: str
    ) -> Tensor:
        network, slots = trip.network, load.shape[1]
        wires = [wire for wire in (network.across, network.node) if wire.size > 1] or [network.node]
        return self._deliver(trip, x, Pairs.of(token, weight, load, scale), wires, slots)

    def _deliver(self, trip: Trip, x: Tensor, pairs: Pairs, wires: list[Wire], slots: int) -> Tensor:
        """Rows to the ranks of the first wire, and from there on; the sums of their results come back."""
        if not wires:
            return pairs.compute(trip, x, slots)
        wire, below = wires[0], slots * (wires[1].size if len(wires) > 1 else 1)
        rank = pairs.slot // below
        rows = max(len(x), 1)
        copies, copy = (rank * rows + pairs.row).unique(
            return_inverse=True
        )  # one for a rank and row, in this order
        counts = torch.stack([torch.bincount(each, minlength=wire.size) for each in (copies // rows, rank)], 1)
        first = counts[:, 0].cumsum(0) - counts[:, 0]
        arrived = trip.counts(wire, counts)
        send, receive = counts.t().tolist(), arrived.t().tolist()
        row = copies % rows
        there = trip.exchange(wire, x.index_select(0, row), send[0], receive[0], "dispatch")
        sizes = [send[1], receive[1], receive[0]]
        pairs = pairs.sent(trip, wire, copy - first[rank], below, sizes)
        y = trip.exchange(wire, self._deliver(trip, there, pairs, wires[1:], slots), receive[0], send[0], "combine")
        return y.new_zeros(len(x), y.shape[1]).index_add(0, row, y)


@transport("gather")
class Gather(TokenTransport):
    """Every rank gets every token, computes its own experts, and the results are added up on the way home.

        bytes to each rank = own tokens * width * bytes per number there, its tokens likewise back

    All-gather and reduce-scatter (Liu et al. 2025): good for few ranks and many experts per token.
    """

    def carry_tokens(
        self, trip: Trip, x: Tensor, token: Tensor, weight: Tensor, load: Tensor, scale: str
    ) -> Tensor:
        wire, slots = trip.network.expert, load.shape[1]
        counts = torch.stack([torch.full_like(load[:, 0], len(x)), load.sum(1)], 1)
        arrived = trip.counts(wire, counts).t().tolist()
        every = trip.gather(wire, x, arrived[0], "dispatch")
        sizes = [counts[:, 1].tolist(), arrived[1], arrived[0]]
        pairs = Pairs.of(token, weight, load, scale).sent(trip, wire, token, slots, sizes)
        return trip.scatter_sum(wire, pairs.compute(trip, every, slots), arrived[0], "combine")
