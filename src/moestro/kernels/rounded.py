"""One product per expert over row counts rounded up, for libraries that compile a kernel per shape."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from moestro.kernels.grouped import backend
from moestro.kernels.registered import registered


@backend("rounded")
def rounded(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Grouped matmul as one product per expert, of a row count rounded up to eight sizes per octave.

    On a CPU the bfloat16 products of oneDNN are compiled anew for every shape, which costs two to four times the
    product itself, and routing gives every expert another number of rows at every step. Rounding up wastes at most
    an eighth of the work and meets few shapes. Forward needs no copy: rows past the end of a group are computed
    and then overwritten by the groups they belong to. Any size and dtype; experts without rows cost nothing.
    Shapes: rows `[rows, width]`, weight `[experts, width, out]`, offsets `[experts + 1]` -> `[rows, out]`.
    """
    return _multiply(rows, weight, offsets)


def round_up(count: int) -> int:
    """The next of eight sizes per octave: 1 to 16, then 18, 20 ... 32, 36, 40 ... 64, 72 ..."""
    step = 1 << max(0, (count - 1).bit_length() - 4)
    return -(-count // step) * step


def _product(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """`rows[start:stop] @ weight[e]` for every group, in order: a group overwrites what the one before spilt."""
    rows = rows.contiguous()
    out = rows.new_empty(len(rows), weight.shape[2])
    for e, (start, stop) in enumerate(pairwise(offsets.tolist())):
        end = start + round_up(stop - start)
        if start == stop:
            continue
        if end <= len(rows):
            torch.mm(rows[start:end], weight[e], out=out[start:end])
        else:
            out[start:stop] = (_padded(rows, start, stop) @ weight[e])[: stop - start]
    return out


def _outer(rows: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    """`rows[start:stop]^T @ grad[start:stop]` for every group, zero for those without rows."""
    out = rows.new_zeros(len(offsets) - 1, rows.shape[1], grad.shape[1])
    for e, (start, stop) in enumerate(pairwise(offsets.tolist())):
        if start < stop:
            torch.mm(_padded(rows, start, stop).t(), _padded(grad, start, stop), out=out[e])
    return out


_multiply = registered("rounded", _product, _outer)


def _padded(rows: Tensor, start: int, stop: int) -> Tensor:
    """The rows of a group, with zeros up to the rounded count."""
    count = stop - start
    size = round_up(count)
    if size == count:
        return rows[start:stop]
    piece = rows.new_zeros(size, rows.shape[1])
    piece[:count] = rows[start:stop]
    return piece
