"""How programs find their work, and the inner loop of a product.

Rows grouped by expert are cut into tiles that never cross from one expert to the next. Which tile belongs to whom
is worked out on the device from the offsets, so that the host need not know the loads: it launches a fixed number
of programs, and each takes tiles until there are no more.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def write_table(offsets, table, num_experts, ROWS: tl.constexpr, EXPERTS: tl.constexpr, STEP: tl.constexpr):
    """`table[0]` = number of tiles, then expert and first row of each; one program per expert."""
    expert = tl.program_id(0)
    every = tl.arange(0, EXPERTS)
    start = tl.load(offsets + every, mask=every < num_experts, other=0)
    stop = tl.load(offsets + every + 1, mask=every < num_experts, other=0)
    tiles = (stop - start + ROWS - 1) // ROWS
    before = tl.sum(tl.where(every < expert, tiles, 0), 0)
    own = tl.sum(tl.where(every == expert, tiles, 0), 0)
    first = tl.load(offsets + expert)
    for begin in range(0, own, STEP):
        tile = begin + tl.arange(0, STEP)
        entry = table + 1 + 2 * (before + tile)
        tl.store(entry, tl.zeros((STEP,), tl.int32) + expert, mask=tile < own)
        tl.store(entry + 1, (first + tile * ROWS).to(tl.int32), mask=tile < own)
    if expert == num_experts - 1:
        tl.store(table, (before + own).to(tl.int32))


@triton.jit
def place(tile, num_rows, num_columns, GROUP: tl.constexpr):
    """The row tile and the column tile of a number: GROUP row tiles share their columns while these are cached."""
    in_group = GROUP * num_columns
    first = tile // in_group * GROUP
    size = tl.minimum(num_rows - first, GROUP)
    rest = tile % in_group
    return first + rest % size, rest // size


@triton.jit
def tile_rows(table, offsets, tile, ROWS: tl.constexpr):
    """The expert of a row tile, its rows, and which of them exist."""
    expert = tl.load(table + 1 + 2 * tile).to(tl.int64)
    row = tl.load(table + 2 + 2 * tile).to(tl.int64) + tl.arange(0, ROWS)
    return expert, row, row < tl.load(offsets + expert + 1)


@triton.jit
def source_of(token, row, exists, GATHER: tl.constexpr):
    """The row of x that each pair reads: its token's, or its own."""
    if GATHER:
        row = tl.load(token + row, mask=exists, other=0)
    return row


@triton.jit
def add_bias(total, bias, expert, column, columns, BIAS: tl.constexpr):
    """`total` plus the expert's bias in every row."""
    if BIAS:
        value = tl.load(bias + expert * columns + column, mask=column < columns, other=0.0)
        total += value.to(tl.float32)[None, :]
    return total


@triton.jit
def add_product(
    total,
    a,
    a_exists,
    a_column,
    b,
    b_row,
    b_exists,
    depth,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """`total + A B` for pointers to A's rows `[rows, 1]` and B's columns `[1, columns]`.

    EVEN says that DEPTH divides depth. WIDEN is for the interpreter, which multiplies bfloat16 as bit patterns.
    """
    for start in range(0, depth, DEPTH):
        k = start + tl.arange(0, DEPTH)
        if EVEN:
            left = tl.load(a + k[None, :] * a_column, mask=a_exists, other=0.0)
            right = tl.load(b + k[:, None] * b_row, mask=b_exists, other=0.0)
        else:
            left = tl.load(a + k[None, :] * a_column, mask=a_exists & (k[None, :] < depth), other=0.0)
            right = tl.load(b + k[:, None] * b_row, mask=b_exists & (k[:, None] < depth), other=0.0)
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total


@triton.jit
def add_two_products(
    first,
    second,
    a,
    a_exists,
    a_column,
    b,
    b_row,
    c,
    c_row,
    columns_exist,
    depth,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """`first + A B` and `second + A C`, reading A once."""
    for start in range(0, depth, DEPTH):
        k = start + tl.arange(0, DEPTH)
        if EVEN:
            left = tl.load(a + k[None, :] * a_column, mask=a_exists, other=0.0)
            right = tl.load(b + k[:, None] * b_row, mask=columns_exist, other=0.0)
            other = tl.load(c + k[:, None] * c_row, mask=columns_exist, other=0.0)
        else:
            inside = k < depth
            left = tl.load(a + k[None, :] * a_column, mask=a_exists & inside[None, :], other=0.0)
            right = tl.load(b + k[:, None] * b_row, mask=columns_exist & inside[:, None], other=0.0)
            other = tl.load(c + k[:, None] * c_row, mask=columns_exist & inside[:, None], other=0.0)
        if WIDEN:
            left, right, other = left.to(tl.float32), right.to(tl.float32), other.to(tl.float32)
        first = tl.dot(left, right, first, input_precision=PRECISION)
        second = tl.dot(left, other, second, input_precision=PRECISION)
    return first, second
