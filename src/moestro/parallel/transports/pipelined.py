"""Exchanges in parts, so that experts compute one part while others travel."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moestro.parallel.blocks import block_order, parts_of, permuted
from moestro.parallel.network import Network, Trip
from moestro.parallel.restore import Remembered, Restore, added, taken_from, with_memory
from moestro.parallel.traffic import Phase, forward_phase
from moestro.parallel.transports.base import Transport, transport
from moestro.parallel.wire import Asked


class Pipelined(Transport):
    """All-to-all in parts: while the experts compute one, the next arrives and the last returns.

    Bytes are those of `linear`, whatever the parts. The gradients of the parts go the same way in the same manner;
    the experts' own gradients are added up over the parts.

    Between the passes a part keeps what its experts' graph needs and nothing else, or less, see `Restore`.

    Args:
        restore: what is kept of each part, and how the rest comes back.

    Attributes:
        ahead: parts that are sent off before the results of the first are.

    Raises:
        ValueError: at build, rows that are to be sent again to slices of experts which do not compute again.
    """

    ahead: int = 1

    def __init__(self, restore: Restore | None = None) -> None:
        self.restore = restore or Restore()

    def check(self, network: Network, experts: nn.Module) -> None:
        resends, computes = self.restore.rows is None, self.restore.middle is None
        if resends and not computes and network.mesh.shape.tensor > 1:
            raise ValueError(
                "rows of sliced experts are gathered before they are kept: to send them again, compute again too "
                "(middle=None), or store them"
            )

    @abstractmethod
    def parts(self, trip: Trip, load: Tensor) -> Tensor:
        """How many of each block's rows go with each part, the first rows first. `[parts, ranks, slots]`."""

    def carry(self, trip: Trip, rows: Tensor, load: Tensor) -> Tensor:
        parts = self.parts(trip, load)
        order = block_order(parts.permute(1, 2, 0), (2, 0, 1))
        arrived = trip.counts(trip.network.expert, parts.transpose(0, 1).contiguous()).transpose(0, 1)
        send, receive = torch.stack([parts.sum(2), arrived.sum(2)]).tolist()
        pipeline = _Pipeline(trip, arrived, send, receive, self.ahead, self.restore)
        return permuted(pipeline(permuted(rows, order)), order, inverse=True)


@transport("chunked")
class Chunked(Pipelined):
    """Every slot's rows in equal chunks (Hwang et al. 2022, Tutel; Zhang et al. 2023, MPipeMoE).

        order on the wire: S1 S2 R1 S3 R2 ...        S: rows there, R: results back

    Args:
        chunks: parts of a call.
        restore: see `Pipelined`.

    Raises:
        ValueError: fewer than 1.
    """

    def __init__(self, chunks: int = 2, restore: Restore | None = None) -> None:
        super().__init__(restore)
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
        restore: see `Pipelined`.

    Raises:
        ValueError: a group below 1, or at build, one that does not divide the ranks.
    """

    def __init__(self, group: int = 1, restore: Restore | None = None) -> None:
        super().__init__(restore)
        if group < 1:
            raise ValueError(f"group={group} must be at least 1 rank")
        self.group = group

    @property
    def ahead(self) -> int:  # type: ignore[override]
        return 1_000_000  # all of them

    def check(self, network: Network, experts: nn.Module) -> None:
        super().check(network, experts)
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
        restore: likewise.
    """

    def __init__(
        self,
        trip: Trip,
        arrived: Tensor,
        send: list[list[int]],
        receive: list[list[int]],
        ahead: int,
        restore: Restore,
    ) -> None:
        self.trip, self.arrived, self.send, self.receive = trip, arrived, send, receive
        self.ahead, self.restore = ahead, restore
        self.sizes = [sum(each) for each in send]

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows grouped by part, rank and slot, through their experts."""
        learned = [p for p in self.trip.parameters() if p.requires_grad]
        return self.trip.linked_by(_PipelineFunction, rows, self, *learned)

    def run(self, sent: Sequence[Sent], compute: Callable[..., Tensor], name: str, phase: Phase) -> Tensor:
        """Send parts, compute what arrives and send it back, as far ahead as wanted.

        Args:
            sent: rows that go there, all of a part at the same time.
            compute: a part's number and its rows -> what goes back.
            name: of what goes back, for the counts.
            phase: likewise.
        """
        wire, parts = self.trip.network.expert, len(self.sizes)
        pieces = [each.rows.split(self.sizes) for each in sent]

        def ask(part: int) -> list[Asked]:
            return [wire.ask(each.rows, self.receive[part]) for each in sent]

        def start(part: int, asked: list[Asked]) -> list[Callable[[], Tensor]]:
            return [
                wire.start(rows[part], self.send[part], self.receive[part], each.name, each.phase, asked=answer)
                for each, rows, answer in zip(sent, pieces, asked, strict=True)
            ]

        ahead = [ask(part) for part in range(min(self.ahead, parts))]
        going = [start(part, asked) for part, asked in enumerate(ahead)]
        back: list[Asked] = []
        coming = []
        for part in range(parts):
            if len(going) < parts:
                going.append(start(len(going), ask(len(going))))
            done = compute(part, *(wait() for wait in going[part]))
            going[part] = []
            if len(back) <= part:  # results are asked for one by one until no more rows are
                last = parts if len(going) == parts else part + 1
                back += [wire.ask(done, self.send[each]) for each in range(part, last)]
            coming.append(wire.start(done, self.receive[part], self.send[part], name, phase, asked=back[part]))
        return torch.cat([wait() for wait in coming])

    def experts(self, part: int, rows: Tensor, told: Callable[[Tensor], None]) -> Tensor:
        """A part through the experts; `told` hears of the rows that they take."""
        trip = self.trip.fresh()
        bank = trip.experts

        def listening(rows: Tensor, offsets: Tensor) -> Tensor:
            told(rows)
            return bank(rows, offsets)

        return trip.with_experts(listening).compute(rows, self.arrived[part])


@dataclass(frozen=True)
class Sent:
    """Rows that go to other ranks, with what they are called in the counts."""

    rows: Tensor
    name: str
    phase: Phase


class _PipelineFunction(torch.autograd.Function):
    """A pipeline forward and backward; parts keep a graph of their own in between."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, link: Tensor, pipeline: _Pipeline, *learned: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.pipeline, ctx.learned, ctx.width = pipeline, learned, rows.shape[1]
        needed, kept = any(ctx.needs_input_grad), list[Remembered | None]()
        if needed:
            ctx.save_for_backward(with_memory(kept), *([rows] if pipeline.restore.rows is None else []))

        def compute(part: int, arrived: Tensor) -> Tensor:
            if not needed:
                return pipeline.experts(part, arrived, lambda rows: None)
            load = pipeline.arrived[part]
            part_of = Remembered(
                pipeline.restore,
                arrived,
                lambda rows: pipeline.trip.arranged(rows, load),
                partial(pipeline.experts, part),
                learned,
            )
            kept.append(part_of)
            return part_of.take()

        out = pipeline.run([Sent(rows, "dispatch", forward_phase())], compute, "combine", forward_phase())
        return out, torch.zeros_like(link)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, link: Tensor) -> tuple[Tensor | None, ...]:
        memory, *resent = ctx.saved_tensors  # activation checkpointing runs the layer again here, once
        kept = taken_from(memory)
        if kept is None:
            raise RuntimeError(
                "a pipelined transport goes backward once, run the layer again for a second time; hooks that move "
                "saved tensors elsewhere lose what it kept, pass it restore=... instead"
            )
        total: list[Tensor | None] = [None] * len(ctx.learned)

        def compute(part: int, grad: Tensor, *arrived: Tensor) -> Tensor:
            nonlocal total
            remembered, kept[part] = kept[part], None
            own, others = remembered.gradients(grad, *(arrived or (None,)))
            total = added(total, others)
            return grad.new_zeros(len(grad), ctx.width) if own is None else own

        sent = [Sent(grad, "combine", "backward")]
        sent += [Sent(rows, "dispatch", "recompute") for rows in resent]
        back = ctx.pipeline.run(sent, compute, "dispatch", "backward")
        return back, torch.zeros_like(link), None, *total
