"""One row times a matrix, or a share of it, however the matrix lies in memory.

    rows      [out, in]   floats or int8: an output is a dot product
    blocks    4 bits as torch packs them: the row is rounded to int8 group by group, sums are integers
    columns   [in, out]   floats: inputs are shared out, every part sums up all outputs, the parts' sums are added

A share is a range of units: blocks of 64 outputs, or inputs.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from moestro.kernels.compiled.vectors import (
    add_nibble_products_32,
    add_nibble_products_64,
    barrier,
    from_bfloat16,
    pointer,
    prefetch,
    widen,
)

FLOAT_ROWS, BFLOAT16_ROWS, BYTE_ROWS, NIBBLE_BLOCKS, FLOAT_COLUMNS, BFLOAT16_COLUMNS = range(6)
FIELDS = ("kind", "address", "stride", "scale", "scale_stride", "inputs", "outputs", "group", "lanes")
MATRIX = np.dtype([(name, np.int64) for name in FIELDS])
"""A stack of matrices: where expert 0 starts and how many bytes lie between two experts; `outputs` of one matrix,
`inputs` with its padding; `group` inputs share a scale of 4 bits, and `2 * lanes` outputs make a packed block."""

BLOCK = 64  # outputs of a unit
ROUNDED = np.dtype([("codes", np.int64), ("scales", np.int64), ("sums", np.int64)])
"""Addresses of a row in 8 bits: codes `[in]`, and the scale of each group and 8 times the sum of its codes."""

_MOST_SCALES = 256  # units times groups of inputs whose scales a core asks for at once, 256 bytes each
_AHEAD = 8192  # bytes that a core asks for beyond what it reads: in 4 bits two cores get 59 instead of 35 GB/s


@numba.njit(inline="always")
def view(address: int, shape: Any, dtype: Any) -> Any:
    """Memory as an array."""
    return numba.carray(pointer(address), shape, dtype)


@numba.njit
def by_columns(matrix: Any) -> bool:
    return matrix.kind >= FLOAT_COLUMNS


@numba.njit
def units_of(matrix: Any) -> int:
    """Units into which one matrix can be shared out."""
    return matrix.inputs if by_columns(matrix) else -(-matrix.outputs // BLOCK)


@numba.njit
def share(total: int, part: int, parts: int) -> Any:
    """First and one after the last of a part's units."""
    return total * part // parts, total * (part + 1) // parts


@numba.njit
def add_product(matrix: Any, expert: int, row: Any, rounded: Any, first: int, last: int, out: Any) -> None:
    """Add the product of some units of one expert's matrix to `out`.

    Shapes: row `[in]` float32, out `[out]` float32.
    """
    start = matrix.address + expert * matrix.stride
    inputs, outputs, kind = matrix.inputs, matrix.outputs, matrix.kind
    if kind == NIBBLE_BLOCKS:
        if matrix.lanes == 32:
            _add_blocks_64(matrix, expert, rounded, first, last, out)
        else:
            _add_blocks_32(matrix, expert, rounded, first, last, out)
    elif kind == FLOAT_COLUMNS:
        _add_columns(view(start, (inputs, outputs), np.float32), row, first, last, out)
    elif kind == BFLOAT16_COLUMNS:
        _add_columns(view(start, (inputs, outputs), np.uint16), row, first, last, out)
    elif kind == FLOAT_ROWS:
        _add_rows(view(start, (outputs, inputs), np.float32), row, first, min(last * BLOCK, outputs), out)
    elif kind == BFLOAT16_ROWS:
        _add_rows(view(start, (outputs, inputs), np.uint16), row, first, min(last * BLOCK, outputs), out)
    else:
        codes = view(start, (outputs, inputs), np.int8)
        scale = view(matrix.scale + expert * matrix.scale_stride, outputs, np.uint16)
        _add_scaled_rows(codes, scale, row, first, min(last * BLOCK, outputs), out)


@numba.njit
def spread(matrix: Any, expert: int, row: Any, rounded: Any, sums: int, part: int, parts: int) -> Any:
    """A part's share of a product, written; by columns that is the part's own sum of all outputs.

    Returns: the first output that the part has and the one after its last, after `gather`.
    Shapes: row `[in]`, sums, by address, `[parts or 1, out]`.
    """
    first, last = share(units_of(matrix), part, parts)
    if by_columns(matrix):
        out = view(sums + 4 * part * matrix.outputs, matrix.outputs, np.float32)
        out[:] = np.float32(0)
        add_product(matrix, expert, row, rounded, first, last, out)
        return share(matrix.outputs, part, parts)
    out = view(sums, matrix.outputs, np.float32)
    start, stop = first * BLOCK, min(last * BLOCK, matrix.outputs)
    out[start:stop] = np.float32(0)
    add_product(matrix, expert, row, rounded, first, last, out)
    return start, stop


@numba.njit
def gather(matrix: Any, sums: int, first: int, last: int, parts: int) -> None:
    """Add what all parts found for some outputs, into the first part's sums; parts meet before."""
    if by_columns(matrix):
        barrier()
        total = view(sums, (parts, matrix.outputs), np.float32)
        for other in range(1, parts):
            for o in range(first, last):
                total[0, o] += total[other, o]


@numba.njit(fastmath=True)
def _add_rows(weight: Any, row: Any, first: int, stop: int, out: Any) -> None:
    for o in range(first * BLOCK, stop):
        weights, total = weight[o], np.float32(0)
        for i in range(len(row)):
            total += widen(weights[i]) * row[i]
        out[o] += total


@numba.njit(fastmath=True)
def _add_scaled_rows(codes: Any, scale: Any, row: Any, first: int, stop: int, out: Any) -> None:
    for o in range(first * BLOCK, stop):
        weights, total = codes[o], np.float32(0)
        for i in range(len(row)):
            total += np.float32(weights[i]) * row[i]
        out[o] += total * from_bfloat16(scale[o])


@numba.njit(fastmath={"contract"})
def _add_columns(weight: Any, row: Any, first: int, last: int, out: Any) -> None:
    fours = first + (last - first) // 4 * 4
    for i in range(first, fours, 4):  # a sum is fetched and stored once for four inputs
        a, b, c, d = weight[i], weight[i + 1], weight[i + 2], weight[i + 3]
        start = a.ctypes.data
        for line in range(start + _AHEAD, start + _AHEAD + 4 * weight.itemsize * len(out), 64):
            prefetch(line)
        for o in range(len(out)):
            pair, other = row[i] * widen(a[o]), row[i + 2] * widen(c[o])
            out[o] += (pair + row[i + 1] * widen(b[o])) + (other + row[i + 3] * widen(d[o]))
    for i in range(fours, last):
        weights = weight[i]
        for o in range(len(out)):
            out[o] += row[i] * widen(weights[o])


@numba.njit
def _prefetch_scales(matrix: Any, expert: int, block: int, width: int) -> None:
    """Ask for the scales of a packed block, which lie a group here and a group there."""
    start = matrix.scale + expert * matrix.scale_stride + 4 * block * width
    for number in range(matrix.inputs // matrix.group):
        for line in range(0, 4 * width, 64):
            prefetch(start + 4 * number * matrix.outputs + line)


def _blocks_of(width: int, add_nibble_products: Any) -> Any:
    """`add_product` for packed blocks of so many outputs."""
    lanes = width // 2

    @numba.njit(fastmath=True)
    def add_blocks(matrix: Any, expert: int, rounded: Any, first: int, last: int, out: Any) -> None:
        inputs, outputs, group = matrix.inputs, matrix.outputs, matrix.group
        num_groups, start = inputs // group, matrix.address + expert * matrix.stride
        scale = view(matrix.scale + expert * matrix.scale_stride, (num_groups, outputs, 2), np.uint16)
        row_scale = view(rounded.scales, num_groups, np.float32)
        row_sum = view(rounded.sums, num_groups, np.int32)
        begin, stop = first * BLOCK // width, last * BLOCK // width
        sums, end = np.empty(width, np.int32), start + stop * inputs * lanes
        for block in range(begin, stop):
            if block + 1 < stop:
                _prefetch_scales(matrix, expert, block + 1, width)
            results = out[block * width : block * width + width]
            for number in range(num_groups):
                for d in range(width):
                    sums[d] = -row_sum[number]
                for i in range(number * group, (number + 1) * group, 32):
                    code = start + (block * inputs + i) * lanes
                    if code + _AHEAD < end:
                        for line in range(0, 32 * lanes, 64):
                            prefetch(code + _AHEAD + line)
                    add_nibble_products(code, rounded.codes + i, sums.ctypes.data)
                unit, scales = row_scale[number], scale[number, block * width : block * width + width]
                for d in range(width):
                    results[d] += np.float32(sums[d]) * (unit * from_bfloat16(scales[d, 0]))

    return add_blocks


_add_blocks_64 = _blocks_of(64, add_nibble_products_64)
_add_blocks_32 = _blocks_of(32, add_nibble_products_32)


@numba.njit
def expect(matrix: Any, expert: int, unit: int, last: int, num_bytes: int) -> None:
    """Ask for what a share from this unit on reads first, and for all its scales of groups unless they are many."""
    start = matrix.address + expert * matrix.stride
    if matrix.kind == NIBBLE_BLOCKS:
        start += unit * BLOCK * matrix.inputs // 2
        scales = matrix.scale + expert * matrix.scale_stride + 4 * unit * BLOCK
        length = 4 * BLOCK * min(last - unit, _MOST_SCALES * matrix.group // matrix.inputs)
        for number in range(matrix.inputs // matrix.group):
            for line in range(0, length, 64):
                prefetch(scales + 4 * number * matrix.outputs + line)
    elif by_columns(matrix):
        start += unit * matrix.outputs * (4 if matrix.kind == FLOAT_COLUMNS else 2)
    else:
        size = 4 if matrix.kind == FLOAT_ROWS else 2 if matrix.kind == BFLOAT16_ROWS else 1
        start += unit * BLOCK * matrix.inputs * size
    for line in range(0, num_bytes, 64):
        prefetch(start + line)


@numba.njit(fastmath=True)
def round_row(row: Any, group: int, first: int, last: int, rounded: Any) -> None:
    """Some groups of a row in 8 bits: largest number of a group = 127 units."""
    codes = view(rounded.codes, len(row), np.int8)
    scales = view(rounded.scales, len(row) // group, np.float32)
    sums = view(rounded.sums, len(row) // group, np.int32)
    for number in range(first, last):
        numbers, most = row[number * group : (number + 1) * group], np.float32(1e-30)
        for i in range(group):
            most = max(most, abs(numbers[i]))
        unit, total = most / np.float32(127), np.int32(0)
        for i in range(group):
            code = np.int32(np.floor(numbers[i] / unit + np.float32(0.5)))
            codes[number * group + i] = code
            total += code
        scales[number], sums[number] = unit, 8 * total
