"""What a transport has at hand: the wires of a mesh, and one call's chained exchanges and local experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from moestro.parallel.blocks import block_order, filled_up, offsets_of
from moestro.parallel.borrowed import Borrowed
from moestro.parallel.mesh import Mesh
from moestro.parallel.traffic import Phase, Traffic, forward_phase
from moestro.parallel.wire import Wire

TOGETHER = 4
"""Rows that a product on a CPU takes at a time; a library may add up those left over in another order. Where none
are left over, a row's bits do not depend on how many rows come along, hence not on where experts are."""

Rows = Callable[[Tensor, Phase], Tensor]
Bank = Callable[[Tensor, Tensor], Tensor]


class Network:
    """The wires of a mesh, with one account of what they carry.

    Args:
        mesh: groups of ranks.
        dtype: of rows and gradients on the wire, e.g. bfloat16; None = as they are.

    Attributes:
        traffic: what this rank sent.
    """

    def __init__(self, mesh: Mesh, dtype: torch.dtype | None = None) -> None:
        self.mesh, self.dtype, self.traffic = mesh, dtype, Traffic()

    @cached_property
    def expert(self) -> Wire:
        """To the ranks that hold the other experts."""
        return self._wire(self.mesh.expert)

    @cached_property
    def node(self) -> Wire:
        """To those of them on the same node."""
        return self._wire(self._two_levels()[0])

    @cached_property
    def across(self) -> Wire:
        """To those of them at the same place of every node."""
        return self._wire(self._two_levels()[1])

    @cached_property
    def tensor(self) -> Wire:
        """To the ranks that hold slices of the same experts."""
        return self._wire(self.mesh.tensor)

    @cached_property
    def copies(self) -> Wire:
        """To the ranks that hold the same tokens."""
        return self._wire(self.mesh.copies)

    def highest(self, values: Tensor) -> Tensor:
        """The largest that any rank of a layer's experts and slices has, `[numbers]`; the same on all of them."""
        for wire in (self.expert, self.tensor):
            rows = wire.gather(values.view(1, -1), [1] * wire.size, "counts", forward_phase(), exact=True)
            values = rows.amax(0)
        return values

    def _wire(self, group: Any) -> Wire:
        return Wire(group, self.mesh.node_of, self.traffic, self.dtype)

    def _two_levels(self) -> tuple[Any, Any]:
        if self.mesh.node is None:
            raise ValueError(
                f"nodes of {self.mesh.ranks_per_node} ranks share the {self.mesh.shape.expert} ranks of an expert "
                "group unevenly; a transport of two levels needs as many on each, use transport='linear'"
            )
        return self.mesh.node, self.mesh.across


class Trip:
    """One call of one layer: exchanges with gradients, and the experts of this rank.

    Exchanges are chained: the backward pass undoes them in reverse order on every rank, also on one whose experts
    got no row, need no gradient or have no parameter. Without the chain such a rank would leave one out, and the
    others would wait for it.

    Args:
        network: wires.
        experts: of this rank, `(rows, offsets) -> rows`.
        device: of the rows.
        slices: ranks of the wire `tensor` whose slices together are whole experts; None = all of them.
    """

    def __init__(
        self, network: Network, experts: Bank, device: torch.device, slices: Sequence[int] | None = None
    ) -> None:
        self.network, self.experts, self.device = network, experts, device
        self.slices = range(network.mesh.shape.tensor) if slices is None else slices
        self._link = torch.zeros((), device=device, requires_grad=torch.is_grad_enabled())

    def with_experts(self, experts: Bank, slices: Sequence[int] | None = None) -> Trip:
        """The same call with other experts, and with these slices of them; go on with what it returns only."""
        trip = Trip(self.network, experts, self.device, self.slices if slices is None else slices)
        trip._link = self._link
        return trip

    def fresh(self) -> Trip:
        """Another call, for what has a graph of its own."""
        return Trip(self.network, self.experts, self.device, self.slices)

    @property
    def link(self) -> Tensor:
        """What the next exchange is chained to; before the first, where the chain begins."""
        return self._link

    def parameters(self) -> list[Tensor]:
        """Of the experts of this rank."""
        return list(self.experts.parameters()) if isinstance(self.experts, nn.Module | Borrowed) else []

    def linked_by(self, function: Any, rows: Tensor, *rest: Any) -> Tensor:
        """Apply an autograd function `(rows, link, *rest) -> (out, link)` as the next of the chain."""
        out, self._link = function.apply(rows, self._link, *rest)
        return out

    def counts(self, wire: Wire, load: Tensor) -> Tensor:
        """Tell every rank one row of counts, and learn one from each. Shapes: `[ranks, ...]` int64."""
        each = [1] * wire.size
        return wire.exchange(load, each, each, "counts", forward_phase())

    def exchange(
        self,
        wire: Wire,
        rows: Tensor,
        send: Sequence[int],
        receive: Sequence[int],
        name: str,
        exact: bool = False,
    ) -> Tensor:
        """See `Wire.exchange`; the gradient goes the way back."""
        return self._linked(
            rows,
            lambda each, phase: wire.exchange(each, send, receive, name, phase, exact),
            lambda each, phase: wire.exchange(each, receive, send, name, phase, exact),
        )

    def gather(
        self,
        wire: Wire,
        rows: Tensor,
        sizes: Sequence[int],
        name: str,
        exact: bool = False,
        peers: Sequence[int] | None = None,
    ) -> Tensor:
        """See `Wire.gather`, for rows that every rank then uses in its own way: the gradient is `scatter_sum`."""
        return self._linked(
            rows,
            lambda each, phase: wire.gather(each, sizes, name, phase, exact, peers),
            lambda each, phase: wire.scatter_sum(each, sizes, name, phase, exact, peers),
        )

    def scatter_sum(
        self, wire: Wire, rows: Tensor, sizes: Sequence[int], name: str, peers: Sequence[int] | None = None
    ) -> Tensor:
        """See `Wire.scatter_sum`; the gradient is `gather`."""
        return self._linked(
            rows,
            lambda each, phase: wire.scatter_sum(each, sizes, name, phase, peers=peers),
            lambda each, phase: wire.gather(each, sizes, name, phase, peers=peers),
        )

    def take_share(self, wire: Wire, rows: Tensor, sizes: Sequence[int], name: str) -> Tensor:
        """This rank's part of rows that all ranks have; nothing travels, but the gradient is gathered."""
        first = sum(sizes[: wire.rank])
        return self._linked(
            rows,
            lambda each, phase: each[first : first + sizes[wire.rank]].clone(),
            lambda each, phase: wire.gather(each, sizes, name, phase),
        )

    def join_shares(self, wire: Wire, rows: Tensor, sizes: Sequence[int], name: str) -> Tensor:
        """See `Wire.gather`, for rows that all ranks then use in the same way: the gradient is this rank's part."""
        first = sum(sizes[: wire.rank])
        return self._linked(
            rows,
            lambda each, phase: wire.gather(each, sizes, name, phase),
            lambda each, phase: each[first : first + sizes[wire.rank]].clone(),
        )

    def compute(self, rows: Tensor, load: Tensor) -> Tensor:
        """Run rows that came from several sources through the experts of this rank.

        Where experts are sliced over ranks, the rows of all these ranks are gathered and the partial results
        added up.

        Shapes: rows `[rows, width]` grouped by source and slot, load `[sources, slots]` -> `[rows, out_width]`.
        """
        if len(self.slices) > 1:
            return self._compute_sliced(rows, load)
        return self._compute_here(rows, load)

    def arranged(self, rows: Tensor, load: Tensor) -> Tensor:
        """Rows as the experts of this rank take them; arguments as of `compute`."""
        return rows.index_select(0, self._arrangement(load)[0])

    def _arrangement(self, load: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return filled_up(block_order(load, (1, 0)), load.sum(0), TOGETHER if load.device.type == "cpu" else 1)

    def _compute_here(self, rows: Tensor, load: Tensor) -> Tensor:
        source, place, sizes = self._arrangement(load)
        out = self.experts(rows.index_select(0, source), offsets_of(sizes))
        return out.index_select(0, place)

    def _compute_sliced(self, rows: Tensor, load: Tensor) -> Tensor:
        wire, slices = self.network.tensor, self.slices
        loads = wire.gather(load, [len(load)] * wire.size, "counts", forward_phase(), peers=slices)
        sizes = [0] * wire.size
        for rank, rows_of_rank in zip(slices, loads.view(len(slices), -1).sum(1).tolist(), strict=True):
            sizes[rank] = rows_of_rank
        rows = self.gather(wire, rows, sizes, "slices in", peers=slices)
        return self.scatter_sum(wire, self._compute_here(rows, loads), sizes, "slices out", peers=slices)

    def _linked(self, rows: Tensor, forward: Rows, backward: Rows) -> Tensor:
        return self.linked_by(_Linked, rows, forward, backward)


class _Linked(torch.autograd.Function):
    """A linear map and its adjoint, in a chain with those before and after it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, link: Tensor, forward: Rows, backward: Rows) -> tuple[Tensor, Tensor]:
        ctx.adjoint = backward
        return forward(rows, forward_phase()), torch.zeros_like(link)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, link: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.adjoint(grad, "backward"), torch.zeros_like(link), None, None
