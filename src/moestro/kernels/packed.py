"""Products with 8-bit and 4-bit weights: few rows are bound by the bytes of the weights, many by arithmetic.

torch has the products; here are the formats, the choice between the products, and the rows' own quantisation:

    few rows    torch's packed kernels read the codes and multiply bfloat16 rows
    many rows   rows are quantised to int8, each with its own scale, and multiplied as integers
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from moestro.kernels.compiled import why_not

GROUPS = (32, 64, 128, 256)  # inputs that may share a scale in 4 bits
_BLOCK = 64  # outputs that the packed format of 4 bits interleaves
_ROWS_AT_ONCE = 512  # that are rounded: as many floats stay in a cache, and need no memory from the kernel
_MOST = 15  # the largest multiple of a row's scale that a group may have: 15 * 8 fits into int8


@dataclass(frozen=True, eq=False)
class Int8Matrix:
    """One matrix in 8 bits: `w[o, i] = code[o, i] * scale[o]`.

    Attributes:
        code: `[out, in]` int8, -127 to 127.
        scale: one per output, `[out]` bfloat16.
    """

    few_rows: ClassVar[int] = 4  # so many take the packed kernel; 1024 x 1024, 4 rows: 46 against 53 microseconds

    code: Tensor
    scale: Tensor

    def few(self, rows: Tensor) -> Tensor:
        """bfloat16 rows `[rows, in]` -> `[rows, out]`."""
        return torch._weight_int8pack_mm(rows, self.code, self.scale)

    def sums(self, rows: Tensor) -> Tensor:
        """int8 rows `[rows, in]` times the codes -> `[rows, out]` int32; one is worth `unit` of its output."""
        return torch._int_mm(rows, self.code.t())

    @property
    def unit(self) -> Tensor:
        return self.scale.float()

    def dequantise(self) -> Tensor:
        """The weights that the codes stand for, `[out, in]` float32."""
        return self.code.float() * self.scale.float().unsqueeze(1)


@dataclass(frozen=True, eq=False)
class Int4Matrix:
    """One matrix in 4 bits: `w[o, i] = (code[o, i] - 8) * scale[o, i // group]`.

    The scale of a group is an integer multiple of its row's, 1 to 15 times, so that many rows can be multiplied in
    int8: `(code - 8) * multiple` lies between -120 and 120.

    Attributes:
        code: packed for this processor by `torch._convert_weight_to_int4pack_for_cpu`, `[out, in / 2]` uint8.
        scale: scales of the groups, and zeros, `[in / group, out, 2]` bfloat16.
        row_scale: the unit of each row's scales, `[out]` float32.
        group: inputs that share a scale.
    """

    few_rows: ClassVar[int] = 16  # 1024 x 1024, 16 rows: 175 against 240 microseconds

    code: Tensor
    scale: Tensor
    row_scale: Tensor
    group: int

    def few(self, rows: Tensor) -> Tensor:
        """bfloat16 rows `[rows, in]` -> `[rows, out]`."""
        return torch._weight_int4pack_mm_for_cpu(rows, self.code, self.group, self.scale)

    def sums(self, rows: Tensor) -> Tensor:
        """int8 rows `[rows, in]` times `(code - 8) * multiple` -> `[rows, out]` int32; see `Int8Matrix.sums`."""
        multiple = self.scale[..., 0].float().div_(self.row_scale).round_().to(torch.int8)  # [groups, out]
        return torch._int_mm(rows, _multiples(self.code, multiple, self.group))

    @property
    def unit(self) -> Tensor:
        return self.row_scale

    def dequantise(self) -> Tensor:
        """The weights that the codes stand for, `[out, in]` float32."""
        scale = self.scale[..., 0].float().repeat_interleave(self.group, dim=0)  # [in, out]
        return (unpack_codes(self.code) * scale).t().contiguous()


PackedMatrix = Int8Matrix | Int4Matrix


def integer_product(codes: Tensor, row_scale: Tensor, matrix: PackedMatrix) -> Tensor:
    """Rows that `quantise_rows` made, times the matrix -> `[rows, out]` bfloat16."""
    return matrix.sums(codes).float().mul_(matrix.unit).mul_(row_scale).bfloat16()


def quantise_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in 8 bits, each with a scale of its own: codes `[rows, in]` int8, scale `[rows, 1]` float32."""
    parts = [_quantise_rows(part) for part in rows.split(_ROWS_AT_ONCE)]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([codes for codes, _ in parts]), torch.cat([scale for _, scale in parts])


def _quantise_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    rows = rows.float()
    scale = rows.abs().amax(1, keepdim=True).clamp_(min=1e-30).div_(127)
    return rows.div(scale).round_().to(torch.int8), scale


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes `[..., out, in]` int8 and scales `[..., out]` bfloat16 of weights `[..., out, in]`.

    scale = max |w| / 127 per output,   code = round(w / scale)
    """
    weight = weight.float()
    scale = _rounded_up(weight.abs().amax(-1) / 127)
    return weight.div(scale.float().unsqueeze(-1)).round_().to(torch.int8), scale


def to_int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes `[out, in]` int32 from 0 to 15, scales and row scales of `Int4Matrix` for weights `[out, in]`.

    unit = max |w| of the row / (7 * 15),   multiple = max |w| of the group / (7 * unit), rounded up,
    code = 8 + round(w / (multiple * unit))
    """
    weight = weight.float()
    grouped = weight.unflatten(1, (-1, group))  # [out, groups, group]
    most = grouped.abs().amax(-1)
    unit = (most.amax(1) / (7 * _MOST)).clamp(min=1e-30)
    multiple = (most / (7 * unit.unsqueeze(1)) - 1e-4).ceil().clamp(1, _MOST)
    scale = (multiple * unit.unsqueeze(1)).bfloat16()  # [out, groups]
    code = (grouped / scale.float().unsqueeze(-1)).round().clamp(-8, 7) + 8
    scales = torch.stack([scale, torch.zeros_like(scale)], dim=-1).transpose(0, 1).contiguous()
    return code.flatten(1).int(), scales, unit


def _multiples(code: Tensor, multiple: Tensor, group: int) -> Tensor:
    """The codes less 8, times the multiple of their group, `[in, out]` int8: compiled where that can be had."""
    if why_not() is not None or not (code.is_contiguous() and multiple.is_contiguous()):
        return unpack_codes(code).view(len(multiple), group, -1).mul_(multiple.unsqueeze(1)).flatten(0, 1)
    from moestro.kernels.compiled.unpack import unpack_multiples

    return unpack_multiples(code, multiple, group, packed_block() // 2)


def pack_codes(code: Tensor) -> Tensor:
    """Codes `[out, in]` int32 in this processor's packed format, `[out, in / 2]` uint8; out a multiple of 64."""
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(code, 1)
    return packed


def unpack_codes(packed: Tensor) -> Tensor:
    """The codes less 8, `[in, out]` int8, from this processor's packed format."""
    out, half = packed.shape
    width = packed_block()
    blocks = packed.view(out // width, half * 2, width // 2)
    blocks = blocks.permute(1, 0, 2).contiguous()  # [in, blocks, width / 2]
    codes = torch.stack([blocks & 15, blocks >> 4], dim=2)  # several passes: torch is slow on runs of 32 bytes
    return codes.view(torch.int8).view(half * 2, out).sub_(8)


@cache
def packed_block() -> int:
    """Outputs that one block of the packed format holds; found by packing a matrix whose codes tell their place.

    Byte d of a block holds output d in its low bits and output d + block / 2 in its high ones, input after input.

    Raises:
        RuntimeError: torch packs for this processor in a way that we do not know.
    """
    output = torch.arange(_BLOCK).unsqueeze(1).expand(_BLOCK, 32)
    low, high = (pack_codes(part.int().contiguous()) for part in (output % 16, output // 16))
    for width in (64, 32):
        half = width // 2
        place = torch.arange(_BLOCK).view(-1, 1, 2, half).expand(-1, 32, 2, half)  # [blocks, in, 2, half]
        expected = [
            (part[:, :, 0] + 16 * part[:, :, 1]).to(torch.uint8).flatten() for part in (place % 16, place // 16)
        ]
        if torch.equal(low.flatten(), expected[0]) and torch.equal(high.flatten(), expected[1]):
            return width
    raise RuntimeError("torch packs 4-bit weights in an unknown order on this processor; quantise to 8 bits")


def pad_inputs(x: Tensor, size: int) -> Tensor:
    """Zeros behind the last axis up to `size`."""
    return F.pad(x, (0, size - x.shape[-1])) if x.shape[-1] < size else x


def _rounded_up(scale: Tensor) -> Tensor:
    """bfloat16 scales that are not smaller, so that no code leaves its range; 1 where all weights are zero."""
    rounded = scale.bfloat16()
    larger = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    rounded = torch.where(rounded.float() < scale, larger, rounded)
    return rounded.masked_fill(rounded == 0, 1.0)
