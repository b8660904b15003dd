"""A router whose choice is now and then overruled."""

from __future__ import annotations

from dataclasses import replace

import torch

from moestro.routers.base import Router
from moestro.routers.wrapped import Wrapped
from moestro.routing import Context, Decision, SparseRouting


class Rerouted(Wrapped):
    """Sends whole calls to other experts with a small probability; in training only.

        expert <- (expert + shift) mod E,   shift ~ U{1 .. E - 1}, one draw per call        Fan et al. 2021

    Args:
        router: decides first; a router that notes its choices and weighs them all alike.
        probability: how often a call is overruled.

    Raises:
        ValueError: a probability outside 0 to 1.
    """

    def __init__(self, router: Router, probability: float) -> None:
        super().__init__(router)
        if not 0 <= probability <= 1:
            raise ValueError(f"reroute={probability} is a probability; pass 0 to 1")
        self.probability = probability

    def decide(self, x: torch.Tensor, context: Context) -> Decision:
        decision = self.router.decide(x, context)
        if not self.training or self.num_experts < 2 or torch.rand(()) >= self.probability:
            return decision
        shift = int(torch.randint(1, self.num_experts, ()))
        choice = (decision.notes["choice"] + shift) % self.num_experts
        weight = torch.ones_like(choice, dtype=x.dtype)
        routing = SparseRouting.from_choice(choice, weight, self.num_experts, decision.notes.get("kept"))
        return replace(decision, routing=routing, notes={**decision.notes, "choice": choice})

    def extra_repr(self) -> str:
        return f"probability={self.probability}"
