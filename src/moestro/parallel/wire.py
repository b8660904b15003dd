"""The counting layer under all collectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moestro.parallel.traffic import Link, Phase, Traffic

Works = list[Any]


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
    ) -> Callable[[], Tensor]:
        """Begin an exchange; call what is returned to wait for the rows."""
        narrow = self.dtype is not None and not exact and rows.is_floating_point()
        wire_rows = (rows.to(self.dtype) if narrow else rows).contiguous()
        arrived = wire_rows.new_empty(sum(receive), *rows.shape[1:])
        each = wire_rows.element_size() * rows.shape[1:].numel()
        self.traffic.add(name, phase, [n * each for n in send], self.links)
        begin = self._one_by_one if dist.get_backend(self.group) == "gloo" else self._all_at_once
        works = begin(arrived, wire_rows, list(receive), list(send))

        def wait(kept: Tensor = wire_rows) -> Tensor:  # the back end reads the rows until then
            for work in works:
                work.wait()
            return arrived.to(rows.dtype)

        return wait

    def _all_at_once(self, arrived: Tensor, rows: Tensor, receive: list[int], send: list[int]) -> Works:
        return [dist.all_to_all_single(arrived, rows, receive, send, self.group, async_op=True)]

    def _one_by_one(self, arrived: Tensor, rows: Tensor, receive: list[int], send: list[int]) -> Works:
        """All rows are asked for before any are sent, beginning with the next rank.

        gloo's own all-to-all sends first; between two ranks that do not start at the same moment its request for
        rows then waits behind the rows it sends, and one link carries one direction at a time: measured, twice the
        time of an exchange with one other node.
        """
        here, there = arrived.split(receive), rows.split(send)
        here[self.rank].copy_(there[self.rank])
        turns = [(self.rank + turn) % self.size for turn in range(1, self.size)]
        works = [dist.irecv(here[r], group=self.group, group_src=r) for r in reversed(turns) if receive[r]]
        return works + [dist.isend(there[r], group=self.group, group_dst=r) for r in turns if send[r]]

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
