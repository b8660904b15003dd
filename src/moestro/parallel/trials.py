"""How long a transport takes, tried out on the rows of a call before it carries them."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from moestro.parallel.network import Trip
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
