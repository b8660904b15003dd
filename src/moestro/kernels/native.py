"""torch's own grouped product behind a wrapper that makes every size and dtype safe."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moestro.kernels.grouped import backend
from moestro.kernels.loop import loop
from moestro.kernels.registered import registered

_ALIGNMENT = 16  # bytes that grouped_mm asks of every stride
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@backend("native")
def native(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Grouped matmul by `torch.nn.functional.grouped_mm`, forward and backward.

    The bare function refuses widths that are no multiple of 16 bytes, expanded gradients and zero rows, and
    leaves the gradient of an expert without rows uninitialised; here sizes are padded with zeros, gradients
    made contiguous and empty experts cleared. It has no float64 kernel: such rows, and a call without
    rows, are multiplied an expert at a time, which gives the same values.
    Shapes: rows `[rows, width]`, weight `[experts, width, out]`, offsets `[experts + 1]` -> `[rows, out]`.
    """
    return _multiply(rows, weight, offsets)


def _product(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    if rows.dtype not in _DTYPES or not len(rows):
        return loop(rows, weight, offsets)
    out, multiple = weight.shape[2], _ALIGNMENT // rows.element_size()
    rows = _pad(rows, -rows.shape[1] % multiple, 0)
    weight = _pad(weight, -out % multiple, -weight.shape[1] % multiple)
    result = F.grouped_mm(_aligned(rows), _aligned(weight), offs=offsets[1:].int())
    return result[:, :out].contiguous()


def _outer(rows: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    width, out = rows.shape[1], grad.shape[1]
    if rows.dtype not in _DTYPES or not len(rows):
        loads = offsets.diff().tolist()
        return torch.stack([x.t() @ g for x, g in zip(rows.split(loads), grad.split(loads), strict=True)])
    multiple = _ALIGNMENT // rows.element_size()
    rows, grad = _pad(rows, -width % multiple, 0), _pad(grad, -out % multiple, 0)
    result = F.grouped_mm(_aligned(rows).t(), _aligned(grad), offs=offsets[1:].int())
    result.masked_fill_((offsets.diff() == 0).view(-1, 1, 1), 0)
    return result[:, :width, :out].contiguous()


_multiply = registered("native", _product, _outer)


def _pad(x: Tensor, columns: int, rows: int) -> Tensor:
    return F.pad(x, (0, columns, 0, rows)) if columns or rows else x


def _aligned(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format) if x.data_ptr() % _ALIGNMENT else x.contiguous()
