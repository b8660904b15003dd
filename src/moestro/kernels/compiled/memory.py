"""Tensors as the records that compiled steps read: where they lie and how."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moestro.kernels.compiled.products import (
    BFLOAT16_COLUMNS,
    BFLOAT16_ROWS,
    BYTE_ROWS,
    FLOAT_COLUMNS,
    FLOAT_ROWS,
    MATRIX,
    NIBBLE_BLOCKS,
    ROUNDED,
)
from moestro.kernels.packed import packed_block


class Matrix:
    """A stack of matrices that stays where it is.

    Attributes:
        record: its MATRIX.
        inputs: of a row, with padding.
        outputs: with padding.
        group: inputs that are rounded together where weights have 4 bits, else 0.
    """

    def __init__(self, tensors: tuple[Tensor, ...], **values: int) -> None:
        self.tensors, self.record = tensors, np.zeros(1, MATRIX)
        for name, value in values.items():
            self.record[name] = value
        self.inputs, self.outputs, self.group = values["inputs"], values["outputs"], values.get("group", 0)

    @property
    def columns(self) -> bool:
        """Whether every part of the threads sums up all outputs."""
        return int(self.record["kind"][0]) in (FLOAT_COLUMNS, BFLOAT16_COLUMNS)

    def sums(self, parts: int, count: int = 1) -> Tensor:
        """Room for what `parts` threads find for `count` rows."""
        return torch.empty(parts if self.columns else 1, count, self.outputs)


def float_matrix(weight: Tensor) -> Matrix | None:
    """Of weights `[experts, in, out]`, float32 or bfloat16, that lie by rows or by columns; else None."""
    short = {torch.float32: False, torch.bfloat16: True}.get(weight.dtype)
    if short is None or weight.device.type != "cpu":
        return None
    size = {"inputs": weight.shape[1], "outputs": weight.shape[2], "stride": weight.stride(0) * weight.itemsize}
    place = {"address": weight.data_ptr(), **size}
    if weight.transpose(1, 2).is_contiguous():
        return Matrix((weight,), kind=BFLOAT16_ROWS if short else FLOAT_ROWS, **place)
    if weight.is_contiguous():
        return Matrix((weight,), kind=BFLOAT16_COLUMNS if short else FLOAT_COLUMNS, **place)
    return None


def byte_matrix(code: Tensor, scale: Tensor) -> Matrix:
    """Of codes `[experts, out, in]` int8 and scales `[experts, out]` bfloat16."""
    place = {
        "address": code.data_ptr(),
        "stride": code.stride(0),
        "inputs": code.shape[2],
        "outputs": code.shape[1],
    }
    scales = {"scale": scale.data_ptr(), "scale_stride": 2 * scale.stride(0)}
    return Matrix((code, scale), kind=BYTE_ROWS, **place, **scales)


def nibble_matrix(code: Tensor, scale: Tensor, group: int) -> Matrix:
    """Of codes `[experts, out, in / 2]` that torch packed, and scales `[experts, in / group, out, 2]` bfloat16."""
    place = {"address": code.data_ptr(), "stride": code.stride(0), "inputs": 2 * code.shape[2]}
    scales = {"scale": scale.data_ptr(), "scale_stride": 2 * scale.stride(0), "group": group}
    lanes = packed_block() // 2
    return Matrix((code, scale), kind=NIBBLE_BLOCKS, outputs=code.shape[1], lanes=lanes, **place, **scales)


class Rounded:
    """Room for rows in 8 bits, and a ROUNDED record for each.

    Args:
        rows: how many.
        inputs: numbers of a row.
        group: numbers that share a scale; 0 = no row will be rounded.
    """

    def __init__(self, rows: int, inputs: int, group: int) -> None:
        groups = inputs // group if group else 0
        self.tensors = (
            torch.empty(rows, inputs if group else 0, dtype=torch.int8),
            torch.empty(rows, groups),
            torch.empty(rows, groups, dtype=torch.int32),
        )
        self.record = np.zeros(rows, ROUNDED)
        for name, tensor in zip(("codes", "scales", "sums"), self.tensors, strict=True):
            self.record[name] = [tensor[row].data_ptr() for row in range(rows)]
