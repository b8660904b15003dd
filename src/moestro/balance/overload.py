"""What each expert of an overload guard has carried so far."""

from __future__ import annotations

import torch
from torch import Tensor

from moestro.balance.controllers import Controller
from moestro.layers import MoE
from moestro.routers.overload import OverloadGuard
from moestro.routing import Decision, SparseRouting


class CountCarried(Controller):
    """Adds a step's mean combine weight of each expert to the totals of its `OverloadGuard`.

        total_e <- total_e + sum_t g[t, e] / tokens        Eigen et al. 2013, section 3; t over the whole step

    Raises:
        ValueError: at build, a router that is no `OverloadGuard`.
    """

    def check(self, moe: MoE) -> None:
        if not isinstance(moe.router, OverloadGuard):
            raise ValueError(f"{type(moe.router).__name__} keeps no totals; give the layer an OverloadGuard")

    def measure(self, decision: Decision) -> Tensor:
        """Sums of the combine weights of each expert, then the number of tokens, `[experts + 1]`."""
        routing, valid = decision.routing, decision.notes.get("valid")
        assert isinstance(routing, SparseRouting)
        weight = routing.weight.detach().double()
        sums = weight.new_zeros(routing.num_experts).index_add(0, routing.expert, weight)
        tokens = sums.new_tensor(routing.num_tokens) if valid is None else valid.sum().to(sums)
        return torch.cat([sums, tokens.view(1)])

    @torch.no_grad()
    def update(self, moe: MoE, measured: Tensor) -> None:
        """Count one step. Shapes: measured `[experts + 1]`, as `measure` has it."""
        summed = self.summed(measured)
        router, tokens = moe.router, summed[-1]
        assert isinstance(router, OverloadGuard)
        router.total += (summed[:-1] / tokens.clamp(min=1)).to(router.total.dtype)
        router.calls += (tokens > 0).to(router.calls.dtype)

    def __repr__(self) -> str:
        return "CountCarried()"
