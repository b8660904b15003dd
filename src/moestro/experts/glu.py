"""Gated linear units as experts, stacked in three tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.experts.activations import UNITS, is_gated
from moestro.experts.base import Experts
from moestro.experts.few import run_few
from moestro.experts.fused import check_kernel, operator_of, rows_fused, run_fused
from moestro.experts.single import FeedForward
from moestro.experts.stacked import StackedLinear, hidden_dims, hidden_slice
from moestro.routing import Routing, SparseRouting


class GLU(Experts):
    """A bank of gated feed-forward networks.

        f_e(x) = (act(x W_gate,e) * (x W_up,e)) W_down,e        Shazeer 2020, "GLU Variants Improve Transformer"

    Args:
        num_experts: number of experts.
        width: model width.
        hidden: hidden size of one expert.
        activation: `swiglu` (silu), `geglu` (gelu) or `clamped_swiglu`, which runs as grouped products only.
        bias: whether the three maps add one.
        kernel: `fused` runs the whole bank as one operator on a CPU, `tiled` likewise in such a way that a row's
            bits do not depend on the rows beside it, `triton` as kernels for a GPU; other names are back ends of
            the grouped product, see `moestro.kernels`. `auto` takes the fastest on a CPU; on a GPU see
            `moestro.kernels.triton.suits`.
        recompute: whether a fused operator keeps nothing for the backward and computes the products again.

    Parameters: gate and up `[experts, width, hidden]`, down `[experts, hidden, width]`, and biases
    gate_bias, up_bias `[experts, hidden]`, down_bias `[experts, width]`.
    """

    accumulates = False  # see accumulate_in_place

    def __init__(
        self,
        num_experts: int,
        width: int,
        hidden: int,
        activation: str = "swiglu",
        bias: bool = False,
        kernel: str = "auto",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if not is_gated(activation):
            raise ValueError(f"{activation!r} is not gated; use MLP, or one of {', '.join(UNITS)}")
        self.num_experts, self.width, self.hidden = num_experts, width, hidden
        self.activation, self.bias = activation, bias
        self.kernel, self.recompute = check_kernel(kernel, recompute, activation), recompute
        self.gate = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.up = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.down = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.gate_bias = nn.Parameter(torch.empty(num_experts, hidden)) if bias else None
        self.up_bias = nn.Parameter(torch.empty(num_experts, hidden)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(num_experts, width)) if bias else None
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None) -> None:
        """Draw weights from normal(0, std), by default 1/sqrt(inputs); biases become zero."""
        StackedLinear.initialise(self, std)

    def run(self, x: Tensor, routing: Routing) -> Tensor:
        few = run_few(self, x, routing)
        if few is not None:
            return few
        operator = operator_of(self, x)
        if operator is None or not isinstance(routing, SparseRouting) or routing.scale == "input":
            return super().run(x, routing)
        return run_fused(self, x, routing, operator)

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        operator = operator_of(self, rows)
        if operator is not None:
            return rows_fused(self, rows, offsets, operator)
        apply = StackedLinear(offsets, self.kernel)
        gate = apply(rows, self.gate, self.gate_bias)
        up = apply(rows, self.up, self.up_bias)
        return apply(UNITS[self.activation](gate, up), self.down, self.down_bias)

    @property
    def hidden_dims(self) -> dict[str, int]:
        return hidden_dims(self)

    def slice(self, part: int, parts: int) -> GLU:
        cut = hidden_slice(self, part, parts)
        size = (self.num_experts, self.width, self.hidden // parts)
        bank = GLU(*size, self.activation, kernel=self.kernel, recompute=self.recompute)
        for name, piece in cut.items():
            setattr(bank, name, nn.Parameter(piece.detach().clone(), piece.requires_grad))
        return bank.train(self.training)

    def dense(self, multiple: int = 1) -> FeedForward:
        return FeedForward(self.width, self.hidden * multiple, self.activation, self.bias)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, width={self.width}, hidden={self.hidden}, "
            f"activation={self.activation!r}, bias={self.bias}, kernel={self.kernel!r}"
        )
