"""The counting layer under all collectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moestro.parallel.traffic import Link, Phase, Traffic

Works = list[Any]
TAGS = 1 << 20  # exchanges that can be under way at once


@dataclass(frozen=True)
class Asked:
    """Rows that the other ranks were asked for, and where they will be."""

    arrived: Tensor
    works: Works
    number: int


class Wire:
    """Collectives over one group of ranks.

    Only all-to-all is asked of the back end: all-gather and reduce-scatter of uneven sizes are an all-to-all of
    copies and one followed by a sum in the order of the ranks, which also makes that sum reproducible.

    Args:
        group: of ranks.
        node_of: the node of a rank of the world.
        traffic: counts.
        dtype: of floating-point numbers on the wire; None = as they are.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        node_of: Callable[[int], int],
        traffic: Traffic,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.group, self.traffic, self.dtype = group, traffic, dtype
        self._asked = 0
        ranks = dist.get_process_group_ranks(group)
        self.size, self.rank = len(ranks), dist.get_rank(group)
        own = ranks[self.rank]
        self.links: list[Link] = [
            "self" if r == own else "intra" if node_of(r) == node_of(own) else "inter" for r in ranks
        ]

    def exchange(
        self,
        rows: Tensor,
        send: Sequence[int],
        receive: Sequence[int],
        name: str,
        phase: Phase,
        exact: bool = False,
    ) -> Tensor:
        """Rows in the order of ranks to them, and what comes back in that order.

        Args:
            rows: `[sum of send, ...]`.
            send: rows for each rank.
            receive: rows from each rank.
            name: for the counts.
            phase: likewise.
            exact: whether they travel as they are, whatever the dtype of the wire.
        """
        return self.start(rows, send, receive, name, phase, exact)()

    def start(
        self,
        rows: Tensor,
        send: Sequence[int],
        receive: Sequence[int],
        name: str,
        phase: Phase,
        exact: bool = False,
        asked: Asked | None = None,
    ) -> Callable[[], Tensor]:
        """Begin an exchange; call what is returned to wait for the rows. `asked`: what `ask` answered for it."""
        wire_rows = rows.to(self._dtype_of(rows, exact)).contiguous()
        each = wire_rows.element_size() * rows.shape[1:].numel()
        self.traffic.add(name, phase, [n * each for n in send], self.links)
        asked = asked or self.ask(rows, receive, exact)
        if self._one_by_one:
            here, there = asked.arrived.split(list(receive)), wire_rows.split(list(send))
            works = asked.works + self._give(here, there, asked.number)
        else:
            splits = list(receive), list(send)
            works = [dist.all_to_all_single(asked.arrived, wire_rows, *splits, self.group, async_op=True)]
        arrived = asked.arrived

        def wait(kept: Tensor = wire_rows) -> Tensor:  # the back end reads the rows until then
            for work in works:
                work.wait()
            return arrived.to(rows.dtype)

        return wait

    def ask(self, like: Tensor, receive: Sequence[int], exact: bool = False) -> Asked:
        """Ask for the rows of an exchange that begins later; all ranks ask in the same order.

        gloo's own all-to-all sends first; between two ranks that do not start at the same moment its request for
        rows then waits behind the rows it sends, and one link carries one direction at a time: measured, twice the
        time of an exchange with one other node. The same happens between exchanges that are under way together,
        unless all are asked for before any rows are sent.

        Args:
            like: rows of the dtype and the width of those to come.
            receive: rows from each rank.
            exact: see `exchange`.
        """
        arrived = like.new_empty(sum(receive), *like.shape[1:], dtype=self._dtype_of(like, exact))
        self._asked = (self._asked + 1) % TAGS
        works: Works = []
        if self._one_by_one:
            here = arrived.split(list(receive))
            turns = [r for r in reversed(self._turns()) if receive[r]]
            works = [dist.irecv(here[r], group=self.group, group_src=r, tag=self._asked) for r in turns]
        return Asked(arrived, works, self._asked)

    def _give(self, here: Sequence[Tensor], there: Sequence[Tensor], number: int) -> Works:
        """Rows to every rank, beginning with the next one; numbered, for a later exchange may be over earlier."""
        here[self.rank].copy_(there[self.rank])
        turns = [r for r in self._turns() if len(there[r])]
        return [dist.isend(there[r], group=self.group, group_dst=r, tag=number) for r in turns]

    @property
    def _one_by_one(self) -> bool:
        return dist.get_backend(self.group) == "gloo"

    def _turns(self) -> list[int]:
        return [(self.rank + turn) % self.size for turn in range(1, self.size)]

    def _dtype_of(self, rows: Tensor, exact: bool) -> torch.dtype:
        return rows.dtype if self.dtype is None or exact or not rows.is_floating_point() else self.dtype

    def gather(
        self,
        rows: Tensor,
        sizes: Sequence[int],
        name: str,
        phase: Phase,
        exact: bool = False,
        peers: Sequence[int] | None = None,
    ) -> Tensor:
        """The rows of all ranks, rank r having `sizes[r]` of them; or of some ranks, to which this one belongs."""
        peers = range(self.size) if peers is None else peers
        copies = rows.repeat(len(peers), *[1] * (rows.dim() - 1))
        send, receive = (
            [n * (r in peers) for r, n in enumerate(each)] for each in ([len(rows)] * self.size, sizes)
        )
        return self.exchange(copies, send, receive, name, phase, exact)

    def scatter_sum(
        self,
        rows: Tensor,
        sizes: Sequence[int],
        name: str,
        phase: Phase,
        exact: bool = False,
        peers: Sequence[int] | None = None,
    ) -> Tensor:
        """The sum over ranks, or some of them, of this rank's `sizes[rank]` rows: the adjoint of `gather`."""
        peers, own = range(self.size) if peers is None else peers, sizes[self.rank]
        send, receive = ([n * (r in peers) for r, n in enumerate(each)] for each in (sizes, [own] * self.size))
        pieces = self.exchange(rows, send, receive, name, phase, exact)
        return pieces.view(len(peers), own, *rows.shape[1:]).sum(0)
