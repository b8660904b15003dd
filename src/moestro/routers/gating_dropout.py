"""Gating dropout: now and then, in training, a call sends nothing over the network."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from moestro.routers.capacities import Capacity
from moestro.routing import Context, Selection


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
        drops = self.training and self._draw(weight.device)
        return self.replaced(chosen, num_experts) if drops else chosen

    def replaced(self, chosen: Selection, num_experts: int) -> Selection:
        """What a call that drops does instead."""
        return chosen.restricted(torch.zeros_like(chosen.index, dtype=torch.bool))

    def causal(self, k: int) -> bool:
        return True

    def _draw(self, device: torch.device) -> bool:
        draw = torch.rand(1, device=device)
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(draw, src=0)
        return bool(draw < self.probability)


class StayLocal(SkipLayer):
    """Gate-Drop: tokens stay on their device and go to the expert of the same place there.

        expert e of token t -> home(t) * E/D + e mod E/D,   home(t) = t * D // T        Liu et al. 2022, section 3

    Combine weights stay those of the gate. D devices hold equally many consecutive tokens and experts.

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

    def replaced(self, chosen: Selection, num_experts: int) -> Selection:
        per_device, num_tokens = num_experts // self.num_devices, len(chosen.index)
        home = torch.arange(num_tokens, device=chosen.index.device) * self.num_devices // max(num_tokens, 1)
        return Selection(home.unsqueeze(1) * per_device + chosen.index % per_device, chosen.keep)
