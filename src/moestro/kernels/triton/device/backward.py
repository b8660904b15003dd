"""The gradients of a bank: of hidden units and combine weights, of matrices, of biases."""

from __future__ import annotations

import triton
import triton.language as tl

from moestro.kernels.triton.device.activations import activate, derivative
from moestro.kernels.triton.device.tiles import add_product, place, source_of, tile_rows


@triton.jit
def hidden_gradients(
    grad,
    token,
    offsets,
    table,
    down,
    down_bias,
    weight,
    pre_gate,
    pre_up,
    grad_gate,
    grad_up,
    weighted,
    shares,
    width,
    hidden,
    grad_row,
    grad_column,
    down_expert,
    down_row,
    down_column,
    num_shares,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    GATHER: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BIAS: tl.constexpr,
    SHARES: tl.constexpr,
    NEED_H: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """From the gradient of y to those of the pre-activations.

        dh = weight * (dy W_down^T)
        d weight = <dy, h W_down + b_down> = <dy W_down^T, h> + <dy, b_down>

    so that no output of an expert is needed. A tile of columns has its part of `d weight`: `shares [pairs, tiles]`.
    `weighted` becomes `weight * h`, which the gradient of W_down needs.
    """
    num_rows, num_columns = tl.load(table), tl.cdiv(hidden, COLUMNS)
    for tile in range(tl.program_id(0), num_rows * num_columns, tl.num_programs(0)):
        row_tile, column_tile = place(tile, num_rows, num_columns, GROUP)
        expert, row, exists = tile_rows(table, offsets, row_tile, ROWS)
        source = source_of(token, row, exists, GATHER)
        column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        fits = (column < hidden)[None, :]
        left = grad + source[:, None] * grad_row
        right = down + expert * down_expert + column[None, :] * down_row
        dh = tl.zeros((ROWS, COLUMNS), tl.float32)
        dh = add_product(
            dh, left, exists[:, None], grad_column, right, down_column, fits, width, DEPTH, EVEN, PRECISION, WIDEN
        )
        target, both = row[:, None] * hidden + column[None, :], exists[:, None] & fits
        u = tl.load(pre_up + target, mask=both, other=0.0).to(tl.float32)
        if GATED:
            g = tl.load(pre_gate + target, mask=both, other=0.0).to(tl.float32)
            act = activate(g, ACTIVATION)
            h = act * u
        else:
            h = activate(u, ACTIVATION)
        if SHARES:
            share = tl.sum(dh * h, 1)
            if BIAS:  # noqa: SIM102 - the compiler knows BIAS, and must not see the rest without it
                if column_tile == 0:
                    for start in range(0, width, DEPTH):
                        k = start + tl.arange(0, DEPTH)
                        dy = tl.load(
                            left + k[None, :] * grad_column, mask=exists[:, None] & (k[None, :] < width), other=0.0
                        )
                        b = tl.load(down_bias + expert * width + k, mask=k < width, other=0.0)
                        share += tl.sum(dy.to(tl.float32) * b.to(tl.float32)[None, :], 1)
            tl.store(shares + row * num_shares + column_tile, share, mask=exists)
        if WEIGHTED:
            scale = tl.load(weight + row, mask=exists, other=0.0).to(tl.float32)[:, None]
            dh *= scale
            if NEED_H:
                h *= scale
        if NEED_H:
            tl.store(weighted + target, h.to(weighted.dtype.element_ty), mask=both)
        if GATED:
            tl.store(grad_up + target, (dh * act).to(grad_up.dtype.element_ty), mask=both)
            dg = dh * u * derivative(g, ACTIVATION)
            tl.store(grad_gate + target, dg.to(grad_gate.dtype.element_ty), mask=both)
        else:
            tl.store(grad_up + target, (dh * derivative(u, ACTIVATION)).to(grad_up.dtype.element_ty), mask=both)


@triton.jit
def weight_gradient(
    a,
    a_token,
    b,
    b_token,
    out,
    offsets,
    num_experts,
    size,
    columns,
    a_row,
    a_column,
    b_row,
    b_column,
    out_expert,
    out_row,
    out_column,
    A_GATHER: tl.constexpr,
    B_GATHER: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """`out[e] = A_e^T B_e` over the rows of expert e, zero where it has none; out `[experts, size, columns]`."""
    num_rows, num_columns = tl.cdiv(size, ROWS), tl.cdiv(columns, COLUMNS)
    in_expert = num_rows * num_columns
    for tile in range(tl.program_id(0), num_experts * in_expert, tl.num_programs(0)):
        expert = (tile // in_expert).to(tl.int64)
        row_tile, column_tile = place(tile % in_expert, num_rows, num_columns, GROUP)
        m, n = row_tile * ROWS + tl.arange(0, ROWS), column_tile * COLUMNS + tl.arange(0, COLUMNS)
        m_fits, n_fits = (m < size)[:, None], (n < columns)[None, :]
        start, stop = tl.load(offsets + expert).to(tl.int32), tl.load(offsets + expert + 1).to(tl.int32)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in range(start, stop, DEPTH):
            row = (first + tl.arange(0, DEPTH)).to(tl.int64)
            exists = row < stop
            left = a + source_of(a_token, row, exists, A_GATHER)[None, :] * a_row + m[:, None] * a_column
            right = b + source_of(b_token, row, exists, B_GATHER)[:, None] * b_row + n[None, :] * b_column
            left = tl.load(left, mask=m_fits & exists[None, :], other=0.0)
            right = tl.load(right, mask=n_fits & exists[:, None], other=0.0)
            if WIDEN:
                left, right = left.to(tl.float32), right.to(tl.float32)
            total = tl.dot(left, right, total, input_precision=PRECISION)
        target = expert * out_expert + m[:, None].to(tl.int64) * out_row + n[None, :] * out_column
        tl.store(out + target, total.to(out.dtype.element_ty), mask=m_fits & n_fits)


@triton.jit
def bias_gradient(
    rows,
    token,
    weight,
    out,
    offsets,
    columns,
    row_stride,
    column_stride,
    GATHER: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`out[e]` = sum of the (weighted) rows of expert e; out `[experts, columns]`.

    One program per expert and tile of columns.
    """
    expert = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    fits = column < columns
    start, stop = tl.load(offsets + expert).to(tl.int32), tl.load(offsets + expert + 1).to(tl.int32)
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(start, stop, ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        exists = row < stop
        source = source_of(token, row, exists, GATHER)
        value = tl.load(
            rows + source[:, None] * row_stride + column[None, :] * column_stride,
            mask=exists[:, None] & fits[None, :],
            other=0.0,
        ).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weight + row, mask=exists, other=0.0).to(tl.float32)[:, None]
        total += tl.sum(value, 0)
    tl.store(out + expert * columns + column, total.to(out.dtype.element_ty), mask=fits)
