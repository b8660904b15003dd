"""The one thing that all experts are: a map of rows, grouped by expert."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from moestro.experts.single import FeedForward
from moestro.kernels import as_autocast
from moestro.routing import MergeRouting, Routing


class Piece(NamedTuple):
    """What one expert has of a parameter: a row of it, or all of it (None)."""

    parameter: nn.Parameter
    row: int | None


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

    def share(self, experts: Sequence[int]) -> Experts:
        """A bank of some of these experts, in this order, with copies of their parameters; one may come twice.

        Raises:
            ValueError: a bank that holds something which is not of one expert.
        """
        memo: dict[int, object] = {}
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            if tensor.shape[:1] != (self.num_experts,):
                raise ValueError(
                    f"{type(self).__name__} cannot be shared out: {name} {list(tensor.shape)} is not of one expert "
                    f"in each of {self.num_experts} rows"
                )
            rows = tensor.detach()[list(experts)]
            learned = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(rows, tensor.requires_grad) if learned else rows
        part = copy.deepcopy(self, memo)
        part.num_experts = len(experts)
        return part

    def slice(self, part: int, parts: int) -> Experts:
        """One of several slices of every expert along its hidden size; what the slices return adds up.

        Raises:
            ValueError: a bank that has no such slices, or a hidden size that cannot be cut so.
        """
        raise ValueError(f"{type(self).__name__} cannot be sliced along a hidden size; use a mesh with tensor=1")

    @property
    def hidden_dims(self) -> dict[str, int]:
        """The dimension along which `slice` cuts each parameter; empty where it cuts none."""
        return {}

    def parameters_of(self, expert: int) -> dict[str, Piece]:
        """What one expert has of the bank's parameters, by names that are the same for every expert like it."""
        return {name: Piece(parameter, expert) for name, parameter in self.named_parameters()}

    def replace_bank(self, make: Callable[[Experts], Experts]) -> Experts:
        """What takes this bank's place when `make` replaces what it has of a map of rows, mostly all of it."""
        return make(self)

    def parameters_per_expert(self) -> int:
        """Parameters that a row meets on average: all of them shared out evenly."""
        return sum(p.numel() for p in self.parameters()) // self.num_experts

    def dense(self, multiple: int = 1) -> FeedForward:
        """One dense network with the formula of `multiple` experts side by side, e.g. for a shared expert.

        Raises:
            ValueError: a bank whose experts have no such network.
        """
        raise ValueError(f"{type(self).__name__} has no dense twin; pass MoE(shared=...) a module of your own")
