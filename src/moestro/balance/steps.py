"""Phases: what happens at which optimiser step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.balance.controllers import Controller
from moestro.balance.loss import Loss, Sums
from moestro.layers import MoE
from moestro.routing import Decision


class CountSteps(Controller):
    """Tells a router which optimiser step it is: adds one to `router.step` after each.

    Raises:
        ValueError: at build, a router that counts no steps.
    """

    def check(self, moe: MoE) -> None:
        if not isinstance(getattr(moe.router, "step", None), Tensor):
            raise ValueError(f"{type(moe.router).__name__} has no `step` to count; give it a router with phases")

    @torch.no_grad()
    def update(self, moe: MoE, measured: Tensor) -> None:
        """Count one step; what was measured does not matter."""
        self.check(moe)
        moe.router.get_buffer("step").add_(1)

    def __repr__(self) -> str:
        return "CountSteps()"


@dataclass(frozen=True)
class WhenSparse(Loss):
    """A loss that waits until tokens choose one expert each: 0 while a decision has several choices per token.

    Attributes:
        loss: 0 where all its sums are.
    """

    loss: Loss

    def sums(self, decision: Decision) -> dict[str, Tensor]:
        sums = self.loss.sums(decision)
        return {name: each * 0 for name, each in sums.items()} if decision.notes["choice"].shape[1] > 1 else sums

    def value(self, sums: Sums) -> Tensor:
        return self.loss.value(sums)
