"""The three passes of a bank: rows to hidden units, hidden units to rows, rows to tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from moestro.kernels.triton.device.activations import activate
from moestro.kernels.triton.device.tiles import add_bias, add_product, add_two_products, place, source_of, tile_rows


@triton.jit
def hidden_units(
    x,
    token,
    offsets,
    table,
    gate,
    up,
    gate_bias,
    up_bias,
    pre_gate,
    pre_up,
    h,
    width,
    hidden,
    x_row,
    x_column,
    gate_expert,
    gate_row,
    gate_column,
    up_expert,
    up_row,
    up_column,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    GATHER: tl.constexpr,
    BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    ACTIVATE: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """`h = act(x W_gate) * (x W_up)`, or `act(x W_up)`: gathers the tokens, keeps the pre-activations on demand.

    Pre-activations are rounded to the rows' dtype before they are activated, kept or not, so that the backward
    differentiates what the forward computed.
    """
    num_rows, num_columns = tl.load(table), tl.cdiv(hidden, COLUMNS)
    for tile in range(tl.program_id(0), num_rows * num_columns, tl.num_programs(0)):
        row_tile, column_tile = place(tile, num_rows, num_columns, GROUP)
        expert, row, exists = tile_rows(table, offsets, row_tile, ROWS)
        source = source_of(token, row, exists, GATHER)
        column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        fits = (column < hidden)[None, :]
        a = x + source[:, None] * x_row
        b = up + expert * up_expert + column[None, :] * up_column
        u = tl.zeros((ROWS, COLUMNS), tl.float32)
        if GATED:
            c = gate + expert * gate_expert + column[None, :] * gate_column
            g = tl.zeros((ROWS, COLUMNS), tl.float32)
            u, g = add_two_products(
                u, g, a, exists[:, None], x_column, b, up_row, c, gate_row, fits, width,
                DEPTH, EVEN, PRECISION, WIDEN,
            )  # fmt: skip
        else:
            u = add_product(u, a, exists[:, None], x_column, b, up_row, fits, width, DEPTH, EVEN, PRECISION, WIDEN)
        u = add_bias(u, up_bias, expert, column, hidden, BIAS)
        target, both = row[:, None] * hidden + column[None, :], exists[:, None] & fits
        u = u.to(x.dtype.element_ty)
        if KEEP:
            tl.store(pre_up + target, u, mask=both)
        if GATED:
            g = add_bias(g, gate_bias, expert, column, hidden, BIAS)
            g = g.to(x.dtype.element_ty)
            if KEEP:
                tl.store(pre_gate + target, g, mask=both)
            if ACTIVATE:
                result = activate(g.to(tl.float32), ACTIVATION) * u.to(tl.float32)
                tl.store(h + target, result.to(h.dtype.element_ty), mask=both)
        elif ACTIVATE:
            tl.store(h + target, activate(u.to(tl.float32), ACTIVATION).to(h.dtype.element_ty), mask=both)


@triton.jit
def grouped_product(
    a,
    token,
    b,
    c,
    d,
    bias,
    out,
    offsets,
    table,
    depth,
    columns,
    a_row,
    a_column,
    b_expert,
    b_row,
    b_column,
    c_row,
    c_column,
    d_expert,
    d_row,
    d_column,
    GATHER: tl.constexpr,
    SECOND: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """`out = A B_e`, with SECOND `A B_e + C D_e`, with BIAS plus `bias_e`; out `[rows, columns]`.

    GATHER reads the rows of A through `token`.
    """
    num_rows, num_columns = tl.load(table), tl.cdiv(columns, COLUMNS)
    for tile in range(tl.program_id(0), num_rows * num_columns, tl.num_programs(0)):
        row_tile, column_tile = place(tile, num_rows, num_columns, GROUP)
        expert, row, exists = tile_rows(table, offsets, row_tile, ROWS)
        column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        fits = (column < columns)[None, :]
        source = source_of(token, row, exists, GATHER)
        left = a + source[:, None] * a_row
        right = b + expert * b_expert + column[None, :] * b_column
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        total = add_product(
            total, left, exists[:, None], a_column, right, b_row, fits, depth, DEPTH, EVEN, PRECISION, WIDEN
        )
        if SECOND:
            left = c + source[:, None] * c_row
            right = d + expert * d_expert + column[None, :] * d_column
            total = add_product(
                total, left, exists[:, None], c_column, right, d_row, fits, depth, DEPTH, EVEN, PRECISION, WIDEN
            )
        total = add_bias(total, bias, expert, column, columns, BIAS)
        target = row[:, None] * columns + column[None, :]
        tl.store(out + target, total.to(out.dtype.element_ty), mask=exists[:, None] & fits)


@triton.jit
def combine(
    rows,
    weight,
    order,
    starts,
    y,
    num_tokens,
    num_pairs,
    columns,
    WEIGHTED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`y[t] = sum of weight[p] rows[p]` over the pairs of token t, in the order of its choices, in float32."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    fits = column < columns
    start = tl.load(starts + token)
    stop = tl.load(starts + token + 1, mask=token + 1 < num_tokens, other=num_pairs)
    total = tl.zeros((COLUMNS,), tl.float32)
    for i in range(start, stop):
        pair = tl.load(order + i)
        value = tl.load(rows + pair * columns + column, mask=fits, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weight + pair).to(tl.float32)
        total += value
    tl.store(y + token * columns + column, total.to(y.dtype.element_ty), mask=fits)
