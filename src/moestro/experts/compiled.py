"""The experts that one token chose, or a dense network, as one compiled call over the memory of their weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moestro.experts.activations import is_gated
from moestro.experts.bank import bank_of_one
from moestro.experts.base import Experts
from moestro.experts.glu import GLU
from moestro.experts.mlp import MLP
from moestro.experts.quantised import QuantisedExperts
from moestro.experts.quantised_maps import QuantisedFeedForward
from moestro.experts.quantised_stack import QuantisedStack
from moestro.experts.single import FeedForward, GatedFeedForward

_SAME = {"swiglu": "silu", "geglu": "gelu"}  # what a gated unit applies to its gate


class CompiledBank:
    """`y = residual + sum_i weight[i] f_index[i](row)`, for one token; no gradient.

    What it reads stays the bank's own: it follows changes in place, and must be made again after any other. Weights
    are read as they are and computed with in float32; with 4-bit codes rows are rounded to 8 bits, group by group.

    Args:
        bank: one that `suits_compiled`.

    Shapes: row and residual `[1, width]` float32, index `[chosen]` int64, weight `[1, chosen]` -> `[1, width]`.
    """

    def __init__(self, bank: GLU | MLP | QuantisedExperts) -> None:
        self.bank, self.threads = bank, torch.get_num_threads()
        inner, outer = _matrices(bank)
        self.inner, self.outer = inner, outer
        self.padded = torch.zeros(1, inner[0].inputs) if inner[0].inputs > bank.width else None
        self.call: Any = None
        self.chosen = 0

    def __call__(self, row: Tensor, index: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        if len(index) != self.chosen:
            self.call, self.chosen = self._call(len(index)), len(index)
        if self.padded is not None:
            self.padded[:, : self.bank.width] = row
            row = self.padded
        row, index, weight = row.contiguous(), index.contiguous(), weight.float().contiguous()
        out = torch.empty_like(residual)
        tensors = (row, residual.contiguous(), index, weight, out)
        self.call(*(tensor.data_ptr() for tensor in tensors))
        return out

    def _call(self, chosen: int) -> Any:
        from moestro.kernels.compiled.bank import ACTIVATIONS, BANK, bank_step
        from moestro.kernels.compiled.call import Call
        from moestro.kernels.compiled.memory import Rounded

        bank, parts, (first, *_), outer = self.bank, self.threads, self.inner, self.outer
        sums = first.sums(parts, chosen * len(self.inner))
        records = np.concatenate([matrix.record for matrix in self.inner])
        active = torch.zeros(chosen, outer.inputs)
        gate_bias, up_bias, down_bias = (getattr(bank, f"{name}_bias", None) for name in ("gate", "up", "down"))
        biases = [bias.detach().float() for bias in (gate_bias, up_bias) if bias is not None]
        return Call(
            bank_step(),
            BANK,
            parts,
            inner=_Records(records, self.inner),
            num_inner=len(self.inner),
            outer=outer,
            chosen=chosen,
            width=bank.width,
            hidden=bank.hidden,
            gated=int(is_gated(bank.activation)),
            activation=ACTIVATIONS.index(_applied(bank)),
            inner_bias=torch.cat(biases, dim=1).contiguous() if biases else None,
            outer_bias=None if down_bias is None else down_bias.detach().float().contiguous(),
            rounded=Rounded(parts, first.inputs, first.group),
            inner_sums=sums,
            totals=torch.empty(sums.shape[1:]) if first.columns else sums,
            active=active,
            active_rounded=Rounded(chosen, outer.inputs, outer.group),
            outer_sums=outer.sums(parts),
        )


class CompiledNetwork:
    """`y = residual + f(row)` of a dense network or a shared expert, for one token: a `CompiledBank` of one.

    Args:
        module: one that `suits_compiled_network`.

    Shapes: row and residual `[1, width]` float32 -> `[1, width]`.
    """

    def __init__(self, module: nn.Module) -> None:
        bank, self.gate = _bank_and_gate(module)
        assert bank is not None
        self.bank, self.index, self.one = CompiledBank(bank), torch.zeros(1, dtype=torch.int64), torch.ones(1, 1)

    def __call__(self, row: Tensor, residual: Tensor) -> Tensor:
        weight = self.one if self.gate is None else torch.sigmoid(row @ self.gate.float())
        return self.bank(row, self.index, weight, residual)


def suits_compiled_network(module: nn.Module) -> bool:
    """Whether a `CompiledNetwork` can be made of a module."""
    bank, _ = _bank_and_gate(module)
    return bank is not None and suits_compiled(bank)


def _bank_and_gate(module: nn.Module) -> tuple[GLU | MLP | QuantisedExperts | None, Tensor | None]:
    """The network as a bank of one, None for what is no such network; and the weight `[width, 1]` of its gate."""
    gate = None
    if type(module) is GatedFeedForward:
        gate, module = module.weight.detach(), module.inner
    if type(module) is QuantisedFeedForward:
        return module.bank, gate
    return (bank_of_one(module) if type(module) is FeedForward else None), gate


def suits_compiled(bank: Experts) -> bool:
    """Whether a `CompiledBank` can be made of a bank: a kind, a dtype and a place that compiled steps know."""
    from moestro.kernels.compiled.bank import ACTIVATIONS

    known = type(bank) in (GLU, MLP, QuantisedExperts) and _applied(bank) in ACTIVATIONS
    return known and _matrices(bank) is not None


def _applied(bank: Any) -> str:
    activation: str = bank.activation
    return _SAME.get(activation, activation)


class _Records:
    """Some records in a row, and what they describe."""

    def __init__(self, record: np.ndarray, kept: Any) -> None:
        self.record, self.kept = record, kept


def stack_matrix(stack: QuantisedStack) -> Any:
    """The codes of a stack as compiled steps read them; None away from the CPU."""
    from moestro.kernels.compiled.memory import byte_matrix, nibble_matrix

    if stack.code.device.type != "cpu":
        return None
    return (
        byte_matrix(stack.code, stack.scale)
        if stack.bits == 8
        else nibble_matrix(stack.code, stack.scale, stack.group)
    )


def _matrices(bank: Any) -> Any:
    """The inner matrices, one or gate and up, and the outer; None if any of them is unknown."""
    from moestro.kernels.compiled.memory import float_matrix

    if type(bank) is QuantisedExperts:
        inner, outer = [stack_matrix(bank.up)], stack_matrix(bank.down)
    else:
        names = ("gate", "up") if is_gated(bank.activation) else ("up",)
        inner = [float_matrix(getattr(bank, name).detach()) for name in names]
        outer = float_matrix(bank.down.detach())
    if outer is None or any(matrix is None for matrix in inner):
        return None
    return None if len({matrix.columns for matrix in inner}) > 1 else (inner, outer)
