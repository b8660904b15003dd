"""How long a transport, and what it is made of, takes: tried out before a call's rows are carried."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from moestro.parallel.network import Trip
from moestro.parallel.restore import Pack, Store, keep
from moestro.parallel.strategy_costs import Rates
from moestro.parallel.transports.base import Transport


def trial_seconds(transport: Transport, trip: Trip, rows: Tensor, load: Tensor, repeats: int = 3) -> float:
    """Seconds in which a transport carries rows, and their gradients back where gradients are recorded.

    Of several trials the shortest, of each the slowest rank: all ranks get the same number, so that they can choose
    alike. Nothing is left of a trial: parameters get no gradient, random generators stay as they are, and hooks of
    activation checkpointing see nothing. The bytes are counted as `trial`.

    Args:
        transport: built for these experts.
        trip: the call, which stays as it is.
        rows: as for `Transport.carry`.
        load: likewise.
        repeats: trials, after a first that is not counted.
    """
    devices = [rows.device] if rows.device.type == "cuda" else []
    hooks = saved_tensors_hooks(Tensor.detach, lambda saved: saved)
    with trip.network.traffic.as_trial(), torch.random.fork_rng(devices), hooks:
        seconds = [_once(transport, trip, rows, load) for _ in range(1 + repeats)]
        slowest = trip.network.highest(torch.tensor(seconds[1:], dtype=torch.float64, device=rows.device))
    return float(slowest.min())


def _once(transport: Transport, trip: Trip, rows: Tensor, load: Tensor) -> float:
    learning, call = torch.is_grad_enabled(), trip.fresh()
    rows = rows.detach().requires_grad_(learning)
    begun, began = call.link, _now(rows.device)
    out = transport.carry(call, rows, load)
    if learning:
        learned = [p for p in trip.parameters() if p.requires_grad]
        torch.autograd.grad(out, [rows, begun, *learned], torch.ones_like(out), allow_unused=True)
    return _now(rows.device) - began


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def rates_of(trip: Trip, like: Tensor, rows: int, store: Store | None, repeats: int = 3) -> Rates:
    """How long the experts, the wire and a store take for a row, on the slowest rank, and what experts keep of it.

    Args:
        trip: the call, which stays as it is.
        like: rows of the call; those that are tried are zeros, evenly spread.
        rows: how many to try, one at least and as many on every rank.
        store: None = none, at infinite cost.
        repeats: of which the shortest counts.
    """
    wire, number = trip.network.expert, -(-rows // trip.network.expert.size)
    tried = like.new_zeros(number * wire.size, like.shape[1])
    each = [number] * wire.size
    slots = getattr(trip.experts, "num_experts", 1)
    offsets = torch.arange(slots + 1, device=like.device) * len(tried) // slots
    works: list[Callable[[], object]] = [
        lambda: trip.experts(tried, offsets),
        lambda: wire.exchange(tried, each, each, "dispatch", "forward"),
        *([lambda: store(tried)()] if store is not None else []),
    ]
    with trip.network.traffic.as_trial(), torch.random.fork_rng([like.device] if like.is_cuda else []):
        with torch.no_grad():
            seconds = [min(_timed(work, like.device) for _ in range(1 + repeats)) for work in works]
        found = torch.tensor([*seconds, _kept(trip, tried, offsets)], dtype=torch.float64, device=like.device)
        experts, journey, *copies, middle = (trip.network.highest(found) / len(tried)).tolist()
    copy = copies[0] / 2 if copies else math.inf
    return Rates(experts / 2, journey, copy, like.shape[1] * like.element_size(), middle)


def _timed(work: Callable[[], object], device: torch.device) -> float:
    began = _now(device)
    work()
    return _now(device) - began


def _kept(trip: Trip, rows: Tensor, offsets: Tensor) -> int:
    """Bytes that the experts keep of rows for their gradients, beside the rows and their own parameters."""
    sizes: list[int] = []

    def counted(tensor: Tensor) -> Callable[[], Tensor]:
        sizes.append(tensor.nbytes)
        return keep(tensor)

    pack, rows = Pack(trip.parameters(), keep, counted), rows.detach().requires_grad_()
    pack.told(rows)
    with torch.enable_grad(), saved_tensors_hooks(pack, lambda stored: stored()):
        out = trip.experts(rows, offsets)
    del out
    return sum(sizes)
