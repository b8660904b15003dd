"""One gradient for all replicas of an expert."""

from __future__ import annotations

import torch
from torch import Tensor

from moestro.experts.parallel import ParallelExperts, gradients_of
from moestro.parallel.wire import Wire


@torch.no_grad()
def join_replicas(bank: ParallelExperts) -> None:
    """Give every replica of an expert the sum of the gradients of all; all ranks of an expert group call it.

    Only ranks that hold a replica of one expert exchange its gradient, and all add up in the order of ranks, so
    that replicas stay equal to the bit.
    """
    placement, network = bank.placement, bank.network
    if len(placement.expert_of_slot) == placement.num_experts:
        return
    wire = Wire(network.mesh.expert, network.mesh.node_of, network.traffic)  # gradients at full precision
    holders = {
        expert: sorted({slot // placement.slots_per_rank for slot in placement.slots_of(expert)})
        for expert in range(placement.num_experts)
        if len(placement.slots_of(expert)) > 1
    }
    places: dict[int, list[int]] = {}
    for place, expert in enumerate(placement.experts_of(wire.rank)):
        if expert in holders:
            places.setdefault(expert, []).append(place)
    own = {expert: _sum_of_places(bank, places[expert]) for expert in sorted(places)}
    others = _exchange(wire, own, holders)
    for expert, each in own.items():
        parts = [each if rank == wire.rank else others[rank, expert] for rank in holders[expert]]
        total = torch.stack(parts).sum(0)
        for place in places[expert]:
            grads = gradients_of(bank.local, place)
            for grad, part in zip(grads, total.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(part.view_as(grad))


def _sum_of_places(bank: ParallelExperts, places: list[int]) -> Tensor:
    for place in places:
        for parameter, _ in bank.local.parameters_of(place).values():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
    flat = [torch.cat([grad.flatten() for grad in gradients_of(bank.local, place)]) for place in places]
    return torch.stack(flat).sum(0)


def _exchange(wire: Wire, own: dict[int, Tensor], holders: dict[int, list[int]]) -> dict[tuple[int, int], Tensor]:
    """What other ranks have of the experts that are here too, by rank and expert."""
    common = [[e for e in own if r != wire.rank and r in holders[e]] for r in range(wire.size)]
    sizes = [sum(own[expert].numel() for expert in each) for each in common]
    like = next(iter(own.values()), torch.zeros(0))
    sent = torch.cat([like[:0], *(own[expert] for each in common for expert in each)])
    arrived = wire.exchange(sent, sizes, sizes, "replica gradients", "backward")
    keys = [(rank, expert) for rank, each in enumerate(common) for expert in each]
    return dict(zip(keys, arrived.split([own[expert].numel() for _, expert in keys]), strict=True))
