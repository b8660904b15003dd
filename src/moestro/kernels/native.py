"""torch's own grouped product behind a wrapper that makes every size and dtype safe."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moestro.kernels.grouped import backend
from moestro.kernels.loop import loop

_ALIGNMENT = 16  # bytes that grouped_mm asks of every stride
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@backend("native")
def native(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Grouped matmul by `torch.nn.functional.grouped_mm`, forward and backward.

    The bare function refuses widths that are no multiple of 16 bytes, expanded gradients and zero rows, and
    leaves the gradient of an expert without rows uninitialised; here sizes are padded with zeros, gradients
    made contiguous and empty experts cleared. It has no float64 kernel: such rows, and a call without
    rows, take the `loop` back end, which gives the same values.
    Shapes: rows `[rows, width]`, weight `[experts, width, out]`, offsets `[experts + 1]` -> `[rows, out]`.
    """
    if rows.dtype not in _DTYPES or not len(rows):
        return loop(rows, weight, offsets)
    out = weight.shape[2]
    multiple = _ALIGNMENT // rows.element_size()
    rows = _pad(rows, -rows.shape[1] % multiple, 0)
    weight = _pad(weight, -out % multiple, -weight.shape[1] % multiple)
    result: Tensor = _GroupedMatmul.apply(rows, weight, offsets)
    return result[:, :out]


def _pad(x: Tensor, columns: int, rows: int) -> Tensor:
    return F.pad(x, (0, columns, 0, rows)) if columns or rows else x


def _aligned(x: Tensor) -> Tensor:
    return x.clone() if x.data_ptr() % _ALIGNMENT else x.contiguous()


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        rows, weight = _aligned(rows), _aligned(weight)
        ctx.save_for_backward(rows, weight, offsets)
        return F.grouped_mm(rows, weight, offs=offsets[1:].int())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, offsets = ctx.saved_tensors
        grad, ends = _aligned(grad), offsets[1:].int()
        grad_rows = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_rows = F.grouped_mm(grad, weight.transpose(1, 2), offs=ends)
        if ctx.needs_input_grad[1]:
            grad_weight = F.grouped_mm(rows.t(), grad, offs=ends)
            grad_weight.masked_fill_((offsets.diff() == 0).view(-1, 1, 1), 0)
        return grad_rows, grad_weight, None
