"""Phases: what happens at which optimiser step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.balance.controllers import Controller
from moestro.layers import MoE
from moestro.routing import Decision


class CountSteps(Controller):
    """Tells a router which optimiser step it is: adds one to `router.step` after each.

    Raises:
        ValueError: at update, a router that counts no steps.
    """

    @torch.no_grad()
    def update(self, moe: MoE, measured: Tensor) -> None:
        """Count one step; what was measured does not matter."""
        step = getattr(moe.router, "step", None)
        if not isinstance(step, Tensor):
            raise ValueError(f"{type(moe.router).__name__} has no `step` to count; give it a router with phases")
        step += 1

    def __repr__(self) -> str:
        return "CountSteps()"


@dataclass(frozen=True)
class WhenSparse:
    """A loss that waits until tokens choose one expert each: 0 while a decision has several choices per token.

    Attributes:
        loss: of a Decision.
    """

    loss: Callable[[Decision], Tensor]

    def __call__(self, decision: Decision) -> Tensor:
        """The loss, or 0 in the dense phase."""
        if decision.notes["choice"].shape[1] > 1 and decision.probs is not None:
            return decision.probs.sum() * 0
        return self.loss(decision)
