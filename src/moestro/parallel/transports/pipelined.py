"""Exchanges in parts, so that experts compute one part while others travel."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moestro.parallel.blocks import block_order, parts_of, permuted
from moestro.parallel.network import Network, Trip
from moestro.parallel.traffic import Phase, forward_phase
from moestro.parallel.transports.base import Transport, transport

Start = Callable[[int], Callable[[], Tensor]]


class Pipelined(Transport):
    """All-to-all in parts: while the experts compute one, the next arrives and the last returns.

    Bytes are those of `linear`, whatever the parts. The gradients of the parts go the same way in the same manner;
    the experts' own gradients are added up over the parts.

    Attributes:
        ahead: parts that are sent off before the results of the first are.
    """

    ahead: int = 1

    @abstractmethod
    def parts(self, trip: Trip, load: Tensor) -> Tensor:
        """How many of each block's rows go with each part, the first rows first. `[parts, ranks, slots]`."""

    def carry(self, trip: Trip, rows: Tensor, load: Tensor) -> Tensor:
        parts = self.parts(trip, load)
        order = block_order(parts.permute(1, 2, 0), (2, 0, 1))
        arrived = trip.counts(trip.network.expert, parts.transpose(0, 1).contiguous()).transpose(0, 1)
        send, receive = torch.stack([parts.sum(2), arrived.sum(2)]).tolist()
        pipeline = _Pipeline(trip, arrived, send, receive, self.ahead)
        return permuted(pipeline(permuted(rows, order)), order, inverse=True)


@transport("chunked")
class Chunked(Pipelined):
    """Every slot's rows in equal chunks (Hwang et al. 2022, Tutel; Zhang et al. 2023, MPipeMoE).

        order on the wire: S1 S2 R1 S3 R2 ...        S: rows there, R: results back

    Args:
        chunks: parts of a call.

    Raises:
        ValueError: fewer than 1.
    """

    def __init__(self, chunks: int = 2) -> None:
        if chunks < 1:
            raise ValueError(f"chunks={chunks} must be at least 1")
        self.chunks = chunks

    def parts(self, trip: Trip, load: Tensor) -> Tensor:
        return parts_of(load, self.chunks)


@transport("pairwise")
class Pairwise(Pipelined):
    """One group of ranks after another (He et al. 2022, FasterMoE).

        step s: to the group at distance s, from the group at distance -s;   order: S0 S1 ... R0 R1 ...

    Args:
        group: ranks in a group.

    Raises:
        ValueError: a group below 1, or at build, one that does not divide the ranks.
    """

    def __init__(self, group: int = 1) -> None:
        if group < 1:
            raise ValueError(f"group={group} must be at least 1 rank")
        self.group = group

    @property
    def ahead(self) -> int:  # type: ignore[override]
        return 1_000_000  # all of them

    def check(self, network: Network, experts: nn.Module) -> None:
        if network.mesh.shape.expert % self.group:
            raise ValueError(f"groups of {self.group} ranks do not divide the {network.mesh.shape.expert} ranks")

    def parts(self, trip: Trip, load: Tensor) -> Tensor:
        wire, groups = trip.network.expert, trip.network.expert.size // self.group
        rank = torch.arange(wire.size, device=load.device)
        distance = (rank // self.group - wire.rank // self.group) % groups
        step = torch.arange(groups, device=load.device).unsqueeze(1)
        return load * (distance == step).unsqueeze(2)


class _Pipeline:
    """The parts of one call.

    Args:
        trip: the call.
        arrived: rows of each part that come, `[parts, ranks, slots]`.
        send: rows of each part for each rank.
        receive: rows of each part from each rank.
        ahead: see `Pipelined`.
    """

    def __init__(
        self, trip: Trip, arrived: Tensor, send: list[list[int]], receive: list[list[int]], ahead: int
    ) -> None:
        self.trip, self.arrived, self.send, self.receive, self.ahead = trip, arrived, send, receive, ahead
        self.sizes = [sum(each) for each in send]

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows grouped by part, rank and slot, through their experts."""
        learned = [p for p in self.trip.parameters() if p.requires_grad]
        return self.trip.linked_by(_PipelineFunction, rows, self, *learned)

    def run(
        self, rows: Tensor, compute: Callable[[int, Tensor], Tensor], names: Sequence[str], phase: Phase
    ) -> Tensor:
        """Send parts, compute what arrives and send it back, as far ahead as wanted."""
        wire, pieces = self.trip.network.expert, rows.split(self.sizes)

        def start(part: int) -> Callable[[], Tensor]:
            return wire.start(pieces[part], self.send[part], self.receive[part], names[0], phase)

        going = [start(part) for part in range(min(self.ahead, len(pieces)))]
        coming = []
        for part in range(len(pieces)):
            if len(going) < len(pieces):
                going.append(start(len(going)))
            done = compute(part, going[part]())
            coming.append(wire.start(done, self.receive[part], self.send[part], names[1], phase))
        return torch.cat([wait() for wait in coming])


class _PipelineFunction(torch.autograd.Function):
    """A pipeline forward and backward; parts keep a graph of their own in between."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, link: Tensor, pipeline: _Pipeline, *learned: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.pipeline, ctx.learned, ctx.kept = pipeline, learned, []
        keep = any(ctx.needs_input_grad)

        def compute(part: int, arrived: Tensor) -> Tensor:
            arrived = arrived.detach().requires_grad_(keep)
            with torch.set_grad_enabled(keep):
                out = pipeline.trip.fresh().compute(arrived, pipeline.arrived[part])
            ctx.kept.append((arrived, out))
            return out.detach()

        out = pipeline.run(rows, compute, ("dispatch", "combine"), forward_phase())
        if not keep:
            ctx.kept = []
        return out, torch.zeros_like(link)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, link: Tensor) -> tuple[Tensor | None, ...]:
        kept, ctx.kept = ctx.kept, []
        if not kept:
            raise RuntimeError("a pipelined transport goes backward once; run the layer again for a second time")
        total: list[Tensor | None] = [None] * len(ctx.learned)

        def compute(part: int, grad: Tensor) -> Tensor:
            arrived, out = kept[part]
            kept[part] = (None, None)
            inputs = [arrived, *ctx.learned]
            if not out.requires_grad:
                return torch.zeros_like(arrived)
            own, *others = torch.autograd.grad(out, inputs, grad, allow_unused=True)
            for place, each in enumerate(others):
                if each is not None:
                    before = total[place]
                    total[place] = each if before is None else before + each
            return torch.zeros_like(arrived) if own is None else own

        back = ctx.pipeline.run(grad, compute, ("combine", "dispatch"), "backward")
        return back, torch.zeros_like(link), None, *total
