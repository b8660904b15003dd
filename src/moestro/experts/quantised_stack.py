"""One quantised matrix per expert, as codes and scales."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moestro.kernels.packed import (
    GROUPS,
    Int4Matrix,
    Int8Matrix,
    PackedMatrix,
    integer_product,
    pack_codes,
    pad_inputs,
    quantise_rows,
    to_int4,
    to_int8,
    unpack_codes,
)
from moestro.kernels.rounded import round_up

Group = tuple[int, int, int]  # expert, first row, row after the last

_BLOCK = 64  # outputs are padded to a multiple of it, and inputs: torch reads past the end of other sizes


def groups_of(bounds: list[int]) -> list[Group]:
    """The experts that have rows, and which; rows of expert e are `bounds[e]:bounds[e + 1]`."""
    return [(expert, start, stop) for expert, (start, stop) in enumerate(pairwise(bounds)) if start < stop]


@dataclass(frozen=True)
class TensorError:
    """How far a quantised tensor is from the float one.

    Attributes:
        name: of the tensor.
        bits: per weight, scales counted.
        error: |Q(w) - w| / |w| over the whole tensor.
        worst: the same for the expert that lost most.
    """

    name: str
    bits: float
    error: float
    worst: float

    def __str__(self) -> str:
        return f"{self.name:<40} {self.bits:5.2f} bits  error {self.error:.4f}  worst {self.worst:.4f}"


class QuantisedStack(nn.Module):
    """Matrices `[in, out]` of `num` experts in 8 or 4 bits.

    Args:
        num: number of experts.
        inputs: size of a row going in.
        outputs: size of a row coming out.
        bits: 8 or 4.
        group: inputs that share a scale in 4 bits.

    Buffers: 8 bits: code `[num, out, in]` int8, scale `[num, out]`; 4 bits: code `[num, out, in / 2]` packed,
    scale `[num, in / group, out, 2]`, row_scale `[num, out]`. `out` is padded to a multiple of 64, `in` to one
    of 64 or, in 4 bits, of group. Scales are bfloat16, row scales float32, whatever the model is cast to.

    Raises:
        ValueError: other bits or another group.
    """

    code: Tensor
    scale: Tensor
    row_scale: Tensor

    def __init__(self, num: int, inputs: int, outputs: int, bits: int, group: int) -> None:
        super().__init__()
        if bits not in (8, 4):
            raise ValueError(f"bits={bits}; weights are quantised to 8 or 4 bits")
        if group not in GROUPS:
            raise ValueError(f"group={group}; choose one of {', '.join(map(str, GROUPS))}")
        self.num, self.inputs, self.outputs, self.bits, self.group = num, inputs, outputs, bits, group
        self._matrices: list[PackedMatrix] = []
        multiple = group if bits == 4 else _BLOCK
        self.padded, rows = -(-inputs // multiple) * multiple, -(-outputs // _BLOCK) * _BLOCK
        if bits == 8:
            self.register_buffer("code", torch.zeros(num, rows, self.padded, dtype=torch.int8))
            self.register_buffer("scale", torch.ones(num, rows, dtype=torch.bfloat16))
            return
        self.register_buffer("code", torch.zeros(num, rows, self.padded // 2, dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(num, self.padded // group, rows, 2, dtype=torch.bfloat16))
        self.register_buffer("row_scale", torch.ones(num, rows))

    @torch.no_grad()
    def fill(self, parts: Mapping[str, Tensor]) -> list[TensorError]:
        """Take over matrices `[num, in, out]`, side by side in the order given; the error of each."""
        wrong, size = {name: [] for name in parts}, {name: [] for name in parts}  # type: ignore[var-annotated]
        for expert in range(self.num):
            weight = torch.cat([part[expert].detach().float() for part in parts.values()], dim=1).t()
            self._fill(expert, weight.contiguous())
            difference = self._matrix(expert).dequantise()[: self.outputs, : self.inputs] - weight
            widths = [part.shape[2] for part in parts.values()]
            for name, lost, whole in zip(parts, difference.split(widths), weight.split(widths), strict=True):
                wrong[name].append(lost.square().sum())
                size[name].append(whole.square().sum())
        return [self._error(name, torch.stack(wrong[name]), torch.stack(size[name])) for name in parts]

    def forward(self, rows: Tensor, groups: list[Group]) -> Tensor:
        """Multiply each group of rows by the matrix of its expert.

        Shapes: rows `[rows, in]`, groups (expert, start, stop) in order, those without rows left out ->
        `[rows, out]`.
        """
        if not groups:
            return rows[:, :1].expand(-1, self.outputs)
        if rows.device.type != "cpu" or (torch.is_grad_enabled() and rows.requires_grad):
            return self._dequantised(rows, groups)
        x, matrices = pad_inputs(rows.bfloat16(), self.padded), self.matrices()
        fullest = max(stop - start for _, start, stop in groups)
        if fullest <= matrices[0].few_rows:
            parts = x.split([stop - start for _, start, stop in groups])
            pieces = [matrices[group[0]].few(part) for group, part in zip(groups, parts, strict=True)]
        else:
            pieces = self._many(x, groups, matrices)
        y = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        return (y if y.shape[1] == self.outputs else y[:, : self.outputs]).to(rows.dtype)

    def each(self, rows: Tensor, index: Sequence[int]) -> Tensor:
        """Multiply one row by each of these experts' matrices, or row i by that of expert `index[i]`.

        Shapes: rows `[1, in]` or `[chosen, in]`, bfloat16 on a CPU -> `[chosen, out]`.
        """
        x, matrices = pad_inputs(rows, self.padded), self.matrices()
        if len(rows) == 1:
            pieces = [matrices[expert].few(x) for expert in index]
        else:
            pieces = [matrices[expert].few(row) for expert, row in zip(index, x.split(1), strict=True)]
        y = torch.cat(pieces)
        return y if y.shape[1] == self.outputs else y[:, : self.outputs]

    @staticmethod
    def _many(rows: Tensor, groups: list[Group], matrices: list[PackedMatrix]) -> list[Tensor]:
        """Products in integers where an expert has many rows; the rows' codes are made once for all."""
        codes, scale = quantise_rows(rows)
        pieces = []
        for expert, start, stop in groups:
            if stop - start <= matrices[expert].few_rows:
                pieces.append(matrices[expert].few(rows[start:stop]))
                continue
            end = min(start + round_up(stop - start), len(rows))  # few shapes: oneDNN compiles a kernel for each
            piece = integer_product(codes[start:end], scale[start:end], matrices[expert])
            pieces.append(piece[: stop - start])
        return pieces

    def _dequantised(self, rows: Tensor, groups: list[Group]) -> Tensor:
        return torch.cat([rows[start:stop] @ self.matrix(expert).to(rows.dtype) for expert, start, stop in groups])

    def matrix(self, expert: int) -> Tensor:
        """The weights that an expert's codes stand for, `[in, out]` float32."""
        return self._matrix(expert).dequantise()[: self.outputs, : self.inputs].t()

    def plain_codes(self) -> Tensor:
        """The 4-bit codes in an order that every processor knows: `[num, out, in / 2]` uint8, even inputs low."""
        codes = [(unpack_codes(each) + 8).t().view(torch.uint8) for each in self.code]
        return torch.stack([each[:, 0::2] | each[:, 1::2] << 4 for each in codes])

    @staticmethod
    def packed_codes(plain: Tensor) -> Tensor:
        """What `plain_codes` answered, in this processor's order."""
        codes = torch.stack([plain & 15, plain >> 4], dim=-1).flatten(2)
        return torch.stack([pack_codes(each.int()) for each in codes])

    def _matrix(self, expert: int) -> PackedMatrix:
        if self.bits == 8:
            return Int8Matrix(self.code[expert], self.scale[expert])
        return Int4Matrix(self.code[expert], self.scale[expert], self.row_scale[expert], self.group)

    def matrices(self) -> list[PackedMatrix]:
        """The experts' matrices; views are made once, since making them costs as much as a small product."""
        if not self._matrices or self._matrices[0].code.data_ptr() != self.code.data_ptr():
            self._matrices = [self._matrix(expert) for expert in range(self.num)]
        return self._matrices

    def _fill(self, expert: int, weight: Tensor) -> None:
        weight = F.pad(weight, (0, self.padded - self.inputs, 0, self.code.shape[1] - self.outputs))
        if self.bits == 8:
            self.code[expert], self.scale[expert] = to_int8(weight)
            return
        code, self.scale[expert], self.row_scale[expert] = to_int4(weight, self.group)
        self.code[expert] = pack_codes(code)

    def _error(self, name: str, wrong: Tensor, size: Tensor) -> TensorError:
        bits = 8 * sum(buffer.nbytes for buffer in self.buffers()) / (self.num * self.inputs * self.outputs)
        size = size.clamp(min=1e-30)
        error, worst = (wrong.sum() / size.sum()).sqrt(), (wrong / size).sqrt().max()
        return TensorError(name, bits, float(error), float(worst))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def extra_repr(self) -> str:
        group = f", group={self.group}" if self.bits == 4 else ""
        return f"num={self.num}, inputs={self.inputs}, outputs={self.outputs}, bits={self.bits}{group}"
