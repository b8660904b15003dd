"""Gating dropout: now and then, in training, a call sends nothing over the network."""

from __future__ import annotations

import torch
from torch import Tensor

from moestro.routers.base import shared_draw
from moestro.routers.capacities import Capacity
from moestro.routing import Context, Selection
from moestro.routing.context import home_devices


class SkipLayer(Capacity):
    """Gate-Expert-Drop: nobody is served for a whole call in training; only the residual remains.

    One draw per call, the same on all ranks (Liu et al. 2022, section 3).

    Args:
        probability: how often.

    Raises:
        ValueError: a probability outside 0 to 1.
    """

    batch_independent = True

    def __init__(self, probability: float) -> None:
        super().__init__()
        if not 0 <= probability <= 1:
            raise ValueError(f"gating dropout of rate={probability} must be between 0 and 1")
        self.probability = probability

    def forward(self, chosen: Selection, weight: Tensor, num_experts: int, context: Context) -> Selection:
        if not self.training:
            return chosen
        drops = shared_draw(torch.rand(1, device=weight.device)) < self.probability
        return self.replaced(chosen, drops, num_experts, context)

    def replaced(self, chosen: Selection, drops: Tensor, num_experts: int, context: Context) -> Selection:
        """What a call does that drops; `drops [1]` bool stays a tensor: neither host nor compiler asks for it."""
        return chosen.restricted(~drops.unsqueeze(1))

    def causal(self, k: int) -> bool:
        return True


class StayLocal(SkipLayer):
    """Gate-Drop: tokens stay on their device and go to the expert of the same place there.

        expert e of token t -> home(t) * E/D + e mod E/D        Liu et al. 2022, section 3

    Combine weights stay those of the gate. Token t lives on `Context.device`, or without it on device t * D // T of
    the call; the D devices hold equally many consecutive experts.

    Args:
        probability: how often.
        num_devices: D, at least 2: on one device everything is local.

    Raises:
        ValueError: a single device.
    """

    def __init__(self, probability: float, num_devices: int) -> None:
        super().__init__(probability)
        if num_devices < 2:
            raise ValueError(f"Gate-Drop on num_devices={num_devices} has no effect; pass 2 or more")
        self.num_devices = num_devices

    def replaced(self, chosen: Selection, drops: Tensor, num_experts: int, context: Context) -> Selection:
        per_device = num_experts // self.num_devices
        home = home_devices(context.device, len(chosen.index), self.num_devices, chosen.index.device)
        local = home.unsqueeze(1) * per_device + chosen.index % per_device
        return Selection(torch.where(drops.unsqueeze(1), local, chosen.index), chosen.keep)
