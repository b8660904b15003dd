"""Experts travel, tokens stay."""

from __future__ import annotations

from torch import Tensor, nn

from moestro.parallel.borrowed import Borrowed
from moestro.parallel.network import Network, Trip
from moestro.parallel.transports.base import Transport, transport


@transport("data-centric")
class DataCentric(Transport):
    """Every rank gets the weights of all experts and computes its own rows (Liu et al. 2023, Janus).

        bytes between nodes = slots of a rank * (nodes - 1) * parameters of an expert * bytes per number
        bytes inside a node = slots of a rank * nodes * (ranks per node - 1) * likewise;    gradients likewise back

    Good where rows weigh more than experts: 2 * ranks per node * rows of a rank * width > experts * parameters of
    an expert. An expert crosses to a node once and is passed on there. Weights travel at their own precision, and
    every rank holds all of the layer's for as long as the call and its backward pass.

    Raises:
        ValueError: at build, experts that are not stacked in tensors `[experts, ...]`.
    """

    def check(self, network: Network, experts: nn.Module) -> None:
        self.check_stacked(experts)
        _ = network.node

    @staticmethod
    def check_stacked(experts: nn.Module) -> None:
        """Raise ValueError if experts cannot travel."""
        slots = getattr(experts, "num_experts", 0)
        if any(p.shape[:1] != (slots,) for p in experts.parameters()) or list(experts.buffers()):
            raise ValueError(
                f"{type(experts).__name__} is not stacked in tensors [experts, ...]; use another transport"
            )

    def carry(self, trip: Trip, rows: Tensor, load: Tensor) -> Tensor:
        named = dict(trip.experts.named_parameters())  # type: ignore[attr-defined]
        every = {name: self._gathered(trip, p) for name, p in named.items()}
        experts = Borrowed(trip.experts, every, num_experts=load.numel())
        return trip.with_experts(experts).compute(rows, load.view(1, -1))

    def _gathered(self, trip: Trip, parameter: Tensor) -> Tensor:
        """A parameter of all slots of all ranks, `[all slots, ...]`."""
        node, across = trip.network.node, trip.network.across
        slots = len(parameter)
        each = trip.gather(across, parameter, [slots] * across.size, "experts", exact=True)
        each = trip.gather(node, each, [len(each)] * node.size, "experts", exact=True)
        by_place = each.view(node.size, across.size, slots, *parameter.shape[1:])
        return by_place.transpose(0, 1).reshape(-1, *parameter.shape[1:])
