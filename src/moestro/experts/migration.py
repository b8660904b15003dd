"""Experts change ranks while they are being trained: weights, buffers and the optimiser's state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

from moestro.experts.base import Experts
from moestro.experts.parallel import ParallelExperts
from moestro.parallel import Network, Placement
from moestro.parallel.moves import Move, plan_moves
from moestro.parallel.wire import Wire

Column = list[Tensor]  # a view for each slot of this rank, all alike


@dataclass(frozen=True)
class Migration:
    """What a migration cost.

    Attributes:
        moved: slots of all ranks whose expert came from another rank.
        copied: slots of all ranks whose expert was on the rank already.
        bytes_sent: by this rank to others.
    """

    moved: int
    copied: int
    bytes_sent: int


@torch.no_grad()
def migrate(
    bank: ParallelExperts, placement: Placement, optimiser: torch.optim.Optimizer | None = None
) -> Migration:
    """Re-place the experts of a bank between two steps; all ranks of its expert group call it alike.

    Weights, buffers and the optimiser's state move bit for bit, so the layer computes what it computed before, and
    goes on learning as it would have. Gradients are dropped. An expert that changes its rank costs its weights and
    their states once, for AdamW three times the weights; memory is needed for one parameter or state of the experts
    that move at a time.

    Args:
        bank: in training or not.
        placement: of as many slots on as many ranks.
        optimiser: of the experts' parameters; None = it has none.

    Raises:
        ValueError: a placement that does not fit, a bank whose experts differ, or an optimiser that has a state for
            experts of some ranks and not of others.
    """
    network, before = bank.network, bank.placement
    wire = Wire(network.mesh.expert, network.mesh.node_of, network.traffic)  # bit for bit, whatever rows travel as
    moves = plan_moves(before, placement, network.mesh.ranks_per_node)
    columns = _agreed(wire, bank.local, placement, optimiser)
    sent_before = _sent(network)
    for column in columns.values():
        _move(wire, column, moves, before.slots_per_rank)
    for parameter in bank.parameters():
        parameter.grad = None
    bank.placement = placement
    far = sum(move.source // before.slots_per_rank != move.target // before.slots_per_rank for move in moves)
    return Migration(far, len(moves) - far, _sent(network) - sent_before)


def check_movable(bank: Experts) -> None:
    """Raise ValueError for experts that cannot change places, because they are of several kinds or sizes."""
    kinds = set()
    for expert in range(bank.num_experts):
        pieces = bank.parameters_of(expert).items()
        kinds.add(tuple((name, p.shape if row is None else p.shape[1:]) for name, (p, row) in pieces))
    if len(kinds) != 1:
        raise ValueError(f"{type(bank).__name__} holds experts of several kinds, which cannot change places")


def _sent(network: Network) -> int:
    return network.traffic.bytes("migration") - network.traffic.bytes("migration", link="self")


def _columns(local: Experts, optimiser: torch.optim.Optimizer | None) -> Iterator[tuple[str, Column]]:
    """All that an expert consists of, by name."""
    check_movable(local)
    pieces = [local.parameters_of(slot) for slot in range(local.num_experts)]
    for name in pieces[0]:
        parameters, rows = zip(*(each[name] for each in pieces), strict=True)
        yield name, [_row(parameter, row) for parameter, row in zip(parameters, rows, strict=True)]
        states = [optimiser.state.get(parameter, {}) if optimiser else {} for parameter in parameters]
        for key in sorted(set[str]().union(*states)):
            values = [state.get(key) for state in states]
            if not all(torch.is_tensor(value) for value in values):
                raise ValueError(f"the optimiser has a state {key} of {name} for some experts only; {_STEP}")
            if rows[0] is None or values[0].dim():  # a stack's count of steps is that of all its experts
                yield f"{name}, {key}", [_row(value, row) for value, row in zip(values, rows, strict=True)]
    for name, buffer in local.named_buffers():
        if buffer.shape[:1] != (local.num_experts,):
            raise ValueError(f"{type(local).__name__}: the buffer {name} {list(buffer.shape)} is not of one expert")
        yield name, list(buffer.detach())


_STEP = "take a step in which every expert gets a gradient, then move them"


def _row(tensor: Tensor, row: int | None) -> Tensor:
    return tensor.detach() if row is None else tensor.detach()[row]


def _agreed(
    wire: Wire, local: Experts, placement: Placement, optimiser: torch.optim.Optimizer | None
) -> dict[str, Column]:
    """What moves, if all ranks say the same of it; otherwise they would wait for each other."""
    columns, failure = dict[str, Column](), None
    try:
        columns = dict(_columns(local, optimiser))
    except ValueError as error:
        failure = error
    words = [f"{name} {column[0].dtype} {list(column[0].shape)}" for name, column in columns.items()]
    digest = xxhash.xxh3_64_intdigest("; ".join([str(placement), *words]).encode()) >> 1
    device = next(local.parameters()).device
    digests = wire.gather(torch.tensor([digest], device=device), [1] * wire.size, "migration plan", "forward")
    if failure is not None:
        raise failure
    if len(set(digests.tolist())) > 1:
        raise ValueError(f"ranks were given different placements, or hold experts in different states; {_STEP}")
    return columns


def _move(wire: Wire, column: Column, moves: Sequence[Move], per_rank: int) -> None:
    """Send one column's rows where they go; what was there is overwritten after all have left."""
    sending = [move for move in moves if move.source // per_rank == wire.rank]
    sending.sort(key=lambda move: (move.target // per_rank, move.target))
    arriving = [move for move in moves if move.target // per_rank == wire.rank]
    arriving.sort(key=lambda move: (move.source // per_rank, move.target))
    like = column[0].reshape(-1)
    rows = [column[move.source % per_rank].reshape(-1) for move in sending]
    packed = torch.stack(rows) if rows else like.new_empty(0, len(like))
    send = [sum(move.target // per_rank == rank for move in sending) for rank in range(wire.size)]
    receive = [sum(move.source // per_rank == rank for move in arriving) for rank in range(wire.size)]
    arrived = wire.exchange(packed, send, receive, "migration", "forward")
    for move, row in zip(arriving, arrived, strict=True):
        column[move.target % per_rank].copy_(row.view_as(column[0]))
