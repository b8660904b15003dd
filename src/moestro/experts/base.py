"""The one thing that all experts are: a map of rows, grouped by expert."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.func import functional_call

from moestro.experts.single import FeedForward
from moestro.kernels import as_autocast
from moestro.routing import MergeRouting, Routing


class Experts(nn.Module, ABC):
    """A bank of experts. Quantised, offloaded, parallel and adapted banks keep this signature, so they nest.

    Attributes:
        num_experts: number of experts.
        width: size of a row going in.
        out_width: size of a row coming out; the same, unless a bank says otherwise.
    """

    num_experts: int
    width: int

    @property
    def out_width(self) -> int:
        return self.width

    @abstractmethod
    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """Run every row through its expert.

        Shapes: rows `[rows, width]` grouped by expert, offsets `[experts + 1]` -> `[rows, out_width]`.
        """

    def run(self, x: Tensor, routing: Routing) -> Tensor:
        """Carry out a routing: `y = C F(D x)`. Fused banks override this.

        Shapes: x `[tokens, width]` -> `[tokens, out_width]`.
        """
        rows = routing.dispatch(as_autocast(x))
        if isinstance(routing, MergeRouting):
            return routing.combine(self.merged(routing.mixture, rows, routing.offsets))
        return routing.combine(self(rows, routing.offsets))

    def merged(self, mixture: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
        """Run rows through virtual experts whose parameters are mixtures of ours, `theta_v = M theta`.

        Shapes: mixture `[virtual, experts]`, rows `[rows, width]`, offsets `[virtual + 1]` -> `[rows, out_width]`.
        """
        if not len(mixture):
            return rows.new_zeros(0, self.out_width) + 0 * rows.sum()
        mixed = {
            name: torch.tensordot(mixture.to(parameter.dtype), parameter, dims=1)
            for name, parameter in self.named_parameters()
        }
        return functional_call(self, mixed, (rows, offsets))

    def parameters_per_expert(self) -> int:
        """Parameters that a row meets on average: all of them shared out evenly."""
        return sum(p.numel() for p in self.parameters()) // self.num_experts

    def dense(self, multiple: int = 1) -> FeedForward:
        """One dense network with the formula of `multiple` experts side by side, e.g. for a shared expert.

        Raises:
            ValueError: a bank whose experts have no such network.
        """
        raise ValueError(f"{type(self).__name__} has no dense twin; pass MoE(shared=...) a module of your own")
