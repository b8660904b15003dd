"""Controllers: adjust a router after an optimiser step, without a gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.distributed as dist
from torch import Tensor

from moestro.balance.counts import chosen_load
from moestro.layers import MoE
from moestro.routers import BiasedSelection
from moestro.routing import Decision


class Controller(ABC):
    """Adjusts a layer by what it measured in the decisions of one optimiser step.

    Measures are joined over micro-batches, and over the ranks of `group`; by default they are sums.

    Attributes:
        group: process group whose measures are joined first; None = this process alone.
        option: what methods call the option that sets its strength.
    """

    group: dist.ProcessGroup | None = None
    option: str = ""

    def measure(self, decision: Decision) -> Tensor:
        """What one decision adds; by default the choices per expert, `[experts]`."""
        return chosen_load(decision)

    def join(self, before: Tensor, measured: Tensor) -> Tensor:
        """The measures of two micro-batches as one; by default their sum."""
        return before + measured

    def check(self, moe: MoE) -> None:  # noqa: B027
        """Raise ValueError if this controller cannot act on the layer; called when the layer is built."""

    def idle_reason(self, moe: MoE) -> str | None:
        """Why it can never move anything in this layer, or None; a method refuses the option `option` then."""
        return None

    @abstractmethod
    def update(self, moe: MoE, measured: Tensor) -> None:
        """Act on the measures since the last update, joined."""

    def summed(self, measured: Tensor) -> Tensor:
        """The measure in float64, added up over the group."""
        measured = measured.double()
        if self.group is not None:
            dist.all_reduce(measured, group=self.group)
        return measured


class LossFreeBias(Controller):
    """Moves the selection bias of a router towards an even load.

        b_e <- b_e + rate * sign(mean load - load_e)        Wang et al. 2024, algorithm 1; DeepSeek-AI 2024 (V3)

    The load is of all tokens since the last update: call it once per optimiser step, not per micro-batch.

    Args:
        rate: step of the bias.
        group: process group whose loads are summed first; None = this process alone.

    Raises:
        ValueError: a negative rate; at build, a router without a selection bias.
    """

    option = "bias_rate"

    def __init__(self, rate: float = 1e-3, group: dist.ProcessGroup | None = None) -> None:
        if rate < 0:
            raise ValueError(f"bias rate must not be negative, got {rate}")
        self.rate, self.group = rate, group

    def check(self, moe: MoE) -> None:
        """Raises ValueError for a layer whose router has no selection bias."""
        _biased_selection(moe)

    def idle_reason(self, moe: MoE) -> str | None:
        """With all experts chosen the load is even, and a bias changes no choice."""
        if moe.router.top_k < moe.router.num_experts:
            return None
        return f"every token takes all {moe.router.num_experts} experts, so that a bias changes no choice"

    @torch.no_grad()
    def update(self, moe: MoE, measured: Tensor) -> None:
        """Adjust the layer's bias. Shapes: measured `[experts]`, choices since the last update."""
        select = _biased_selection(moe)
        load = self.summed(measured)
        select.bias += self.rate * torch.sign(load.mean() - load).to(select.bias.dtype)

    def __repr__(self) -> str:
        return f"LossFreeBias(rate={self.rate})"


def _biased_selection(moe: MoE) -> BiasedSelection:
    select = getattr(moe.router, "select", None)
    if not isinstance(select, BiasedSelection):
        raise ValueError("loss-free balancing needs a router whose select slot is a BiasedSelection")
    return select
