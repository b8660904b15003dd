"""Experts whose weights are 8-bit or 4-bit codes: an eighth to a quarter of the memory, and faster on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moestro.experts.activations import PLAIN, UNITS, is_gated
from moestro.experts.base import Experts
from moestro.experts.few import combine_few
from moestro.experts.glu import GLU
from moestro.experts.mlp import MLP
from moestro.experts.quantised_stack import QuantisedStack, TensorError, groups_of
from moestro.routing import Routing, SparseRouting


def quantise(bank: GLU | MLP, bits: int = 8, group: int = 64) -> tuple[QuantisedExperts, list[TensorError]]:
    """The experts of a bank in 8 or 4 bits, and how far each tensor is from what it was.

    Args:
        bank: a `GLU` or `MLP`; it stays as it is.
        bits: 8 (one scale per output) or 4 (one scale per output and group of inputs).
        group: inputs that share a scale in 4 bits: 32, 64, 128 or 256.

    Raises:
        ValueError: another kind of bank, other bits or another group.
    """
    if not isinstance(bank, GLU | MLP):
        raise ValueError(
            f"only GLU and MLP banks can be quantised, got {type(bank).__name__}; quantise the banks inside it"
        )
    experts = QuantisedExperts.like(bank, bits, group)
    names = ("gate", "up") if is_gated(bank.activation) else ("up",)
    errors = experts.up.fill({name: getattr(bank, name) for name in names})
    errors += experts.down.fill({"down": bank.down})
    if bank.bias:
        biases = [getattr(bank, f"{name}_bias") for name in names]
        experts.up_bias = torch.cat([bias.detach() for bias in biases], dim=1).clone()
        experts.down_bias = bank.down_bias.detach().clone()  # type: ignore[union-attr]
    return experts, errors


class QuantisedExperts(Experts):
    """A bank of feed-forward networks with quantised weights, for inference; made by `quantise`.

        f_e(x) = (act(x Q(W_gate,e)) * (x Q(W_up,e))) Q(W_down,e)        plain: act(x Q(W_up,e)) Q(W_down,e)

    On a CPU an expert with few rows (4 in 8 bits, 16 in 4) takes torch's packed kernels, one with more multiplies
    in int8, its rows quantised too, each with a scale of its own. Where a gradient is asked for, and on other
    devices, the weights are dequantised: slow, and differentiable in the rows.

    Args:
        num_experts: number of experts.
        width: model width.
        hidden: hidden size of one expert.
        activation: any of `moestro.experts.ACTIVATIONS`.
        bias: whether the maps add one.
        bits: 8 or 4.
        group: inputs that share a scale in 4 bits.

    Buffers: codes and scales of `up` (gate and up as one matrix, gate first) and `down`; biases up_bias
    `[experts, hidden or 2 hidden]`, down_bias `[experts, width]`.
    """

    up_bias: Tensor | None
    down_bias: Tensor | None

    def __init__(
        self,
        num_experts: int,
        width: int,
        hidden: int,
        activation: str = "swiglu",
        bias: bool = False,
        *,
        bits: int = 8,
        group: int = 64,
    ) -> None:
        super().__init__()
        self.num_experts, self.width, self.hidden = num_experts, width, hidden
        self.activation, self.bits = activation, bits
        parts = 2 if is_gated(activation) else 1
        self.up = QuantisedStack(num_experts, width, parts * hidden, bits, group)
        self.down = QuantisedStack(num_experts, hidden, width, bits, group)
        self.register_buffer("up_bias", torch.zeros(num_experts, parts * hidden) if bias else None)
        self.register_buffer("down_bias", torch.zeros(num_experts, width) if bias else None)

    @classmethod
    def like(cls, bank: GLU | MLP, bits: int, group: int) -> QuantisedExperts:
        """Room for the codes of a bank."""
        sizes = (bank.num_experts, bank.width, bank.hidden)
        return cls(*sizes, bank.activation, bank.bias, bits=bits, group=group)

    @property
    def group(self) -> int:
        """Inputs that share a scale in 4 bits."""
        return self.up.group

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        groups = groups_of(offsets.tolist())
        hidden = _add(self.up(rows, groups), self.up_bias, offsets)
        return _add(self.down(self._activate(hidden), groups), self.down_bias, offsets)

    def run(self, x: Tensor, routing: Routing) -> Tensor:
        """`y = C F(D x)`; for one token neither gather nor inverse permutation, only the weighted sum."""
        if (
            not isinstance(routing, SparseRouting)
            or (routing.num_tokens, routing.scale) != (1, "output")
            or (torch.is_grad_enabled() and x.requires_grad)
        ):
            return super().run(x, routing)
        return combine_few(routing, self(x.expand(len(routing.weight), -1), routing.offsets))

    def answers(self, row: Tensor, index: Sequence[int]) -> Tensor:
        """What each of these experts answers to one row. Shapes: row `[1, width]` bfloat16 -> `[chosen, width]`."""
        hidden = self.up.each(row, index)
        if self.up_bias is not None:
            hidden = hidden + self.up_bias[index].to(hidden.dtype)
        rows = self.down.each(self._activate(hidden), index)
        return rows if self.down_bias is None else rows + self.down_bias[index].to(rows.dtype)

    def merged(self, mixture: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
        """Codes have no mixtures: always ValueError."""
        raise ValueError("quantised experts cannot be merged; merge the float bank, then quantise it")

    def parameters_per_expert(self) -> int:
        biases = sum(bias.shape[1] for bias in (self.up_bias, self.down_bias) if bias is not None)
        return self.up.inputs * self.up.outputs + self.down.inputs * self.down.outputs + biases

    def _activate(self, hidden: Tensor) -> Tensor:
        if self.activation in PLAIN:
            return PLAIN[self.activation](hidden)
        gate, up = hidden.chunk(2, dim=-1)
        return UNITS[self.activation](gate, up)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, width={self.width}, hidden={self.hidden}, "
            f"activation={self.activation!r}, bits={self.bits}"
        )


def _add(rows: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    if bias is None:
        return rows
    return rows + bias.to(rows.dtype).repeat_interleave(offsets.diff(), dim=0, output_size=len(rows))
