"""The experts that one token chose, in one call, with their weighted sum and the residual.

    y = residual + sum_j weight[j] * (outer_e(act(inner_e(row))) + bias_e)        e = index[j]

Threads meet twice, or three times where weights lie by columns.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numba
import numpy as np

from moestro.kernels.compiled.products import (
    BLOCK,
    MATRIX,
    NIBBLE_BLOCKS,
    ROUNDED,
    add_product,
    by_columns,
    expect,
    round_row,
    share,
    units_of,
    view,
)
from moestro.kernels.compiled.sources import compiled, sources
from moestro.kernels.compiled.vectors import barrier, exponential, num_threads, thread_number

_SOON, _MEANWHILE = 8192, 131072  # bytes of what comes next, and of what comes after the threads have met
ACTIVATIONS = ("relu", "gelu", "silu", "squared_relu")
FIELDS = (
    *("row", "residual", "index", "weight", "out"),  # set for every token
    *("inner", "num_inner", "outer", "chosen", "width", "hidden", "gated", "activation"),
    *("inner_bias", "outer_bias", "rounded", "inner_sums", "totals", "active", "active_rounded", "outer_sums"),
)
BANK = np.dtype([(name, np.int64) for name in FIELDS])
"""A call. Addresses, each of float32 unless said otherwise, with `[...]` in elements:

row `[in]` with padding, residual and out `[width]`, index `[chosen]` int64, weight `[chosen]`; inner: MATRIX
records, gate and up or both as one; outer: a MATRIX record; biases `[experts, hidden or 2 hidden]` and
`[experts, width]`, 0 = none; rounded: a ROUNDED record per part; inner_sums `[parts or 1, chosen, out of inner]`;
totals `[chosen, out of inner]`, the same memory unless weights lie by columns; active `[chosen, in of outer]` with
a ROUNDED record per pair in active_rounded; outer_sums `[parts or 1, out of outer]`."""


@numba.njit(fastmath=True)
def _activate(x: Any, activation: int) -> Any:
    if activation == 2:
        return x / (np.float32(1) + exponential(-x))
    if activation == 1:
        return np.float32(0.5) * x * (np.float32(1) + np.float32(math.erf(x * np.float32(0.7071067811865476))))
    x = max(x, np.float32(0))
    return x * x if activation == 3 else x


@numba.njit
def _inner(bank: Any, row: Any, part: int, parts: int) -> None:
    matrices, index = view(bank.inner, bank.num_inner, MATRIX), view(bank.index, bank.chosen, np.int64)
    matrix, count = matrices[0], bank.chosen * bank.num_inner
    units, columns = units_of(matrix), by_columns(matrix)
    rounded = view(bank.rounded, parts, ROUNDED)[part]
    if matrix.kind == NIBBLE_BLOCKS:
        round_row(row, matrix.group, 0, len(row) // matrix.group, rounded)
    offset = 4 * part * count * matrix.outputs if columns else 0
    sums = view(bank.inner_sums + offset, (count, matrix.outputs), np.float32)
    unit, stop = share(count * units, part, parts)
    if unit < stop:
        number, end = unit // units, unit % units + stop - unit
        expert = index[number // bank.num_inner]
        expect(matrices[number % bank.num_inner], expert, unit % units, min(end, units), _SOON)
    while unit < stop:
        number = unit // units
        first = unit - number * units
        last = min(units, first + stop - unit)
        out = sums[number]
        if columns:
            out[:] = np.float32(0)
        else:
            out[first * BLOCK : last * BLOCK] = np.float32(0)
        unit += last - first
        if unit < stop:
            following, end = number + 1, min(units, stop - unit)
            expect(matrices[following % bank.num_inner], index[following // bank.num_inner], 0, end, _SOON)
        expert = index[number // bank.num_inner]
        add_product(matrices[number % bank.num_inner], expert, row, rounded, first, last, out)


@numba.njit(fastmath=True)
def _collect(bank: Any, number: int, start: int, stop: int, parts: int) -> None:
    """Totals of some outputs of one inner matrix, from the parts that had inputs of it."""
    matrix, count = view(bank.inner, 1, MATRIX)[0], bank.chosen * bank.num_inner
    units, size = units_of(matrix), count * matrix.outputs
    total = view(bank.totals + 4 * number * matrix.outputs, matrix.outputs, np.float32)
    total[start:stop] = np.float32(0)
    for part in range(parts):
        first, last = share(count * units, part, parts)
        if first < (number + 1) * units and last > number * units:
            address = bank.inner_sums + 4 * (part * size + number * matrix.outputs)
            sums = view(address, matrix.outputs, np.float32)
            for o in range(start, stop):
                total[o] += sums[o]


@numba.njit(fastmath=True)
def _middle(bank: Any, part: int, parts: int) -> None:
    """Activations of the hidden units, times the combine weight, in groups that are rounded where codes need it."""
    outer, matrix = view(bank.outer, 1, MATRIX)[0], view(bank.inner, 1, MATRIX)[0]
    index, weight = view(bank.index, bank.chosen, np.int64), view(bank.weight, bank.chosen, np.float32)
    size, hidden, columns = matrix.outputs * bank.num_inner, bank.hidden, by_columns(matrix)
    totals = view(bank.totals, (bank.chosen, size), np.float32)
    active = view(bank.active, (bank.chosen, outer.inputs), np.float32)
    group = outer.group if outer.kind == NIBBLE_BLOCKS else BLOCK
    groups = -(-outer.inputs // group)
    first, last = share(bank.chosen * groups, part, parts)
    for unit in range(first, last):
        pair, start = unit // groups, unit % groups * group
        stop = min(start + group, outer.inputs)
        end = min(stop, hidden)
        if columns:
            for which in range(bank.num_inner):
                _collect(bank, pair * bank.num_inner + which, start, end, parts)
        values, out, scale = totals[pair], active[pair], weight[pair]
        if bank.inner_bias != 0:
            bias = view(bank.inner_bias + 4 * index[pair] * hidden * (1 + bank.gated), hidden * 2, np.float32)
            for o in range(start, end):
                values[o] += bias[o]
                if bank.gated:
                    values[hidden + o] += bias[hidden + o]
        if bank.gated:
            for o in range(start, end):
                out[o] = _activate(values[o], bank.activation) * values[hidden + o] * scale
        else:
            for o in range(start, end):
                out[o] = _activate(values[o], bank.activation) * scale
        out[end:stop] = np.float32(0)
        if outer.kind == NIBBLE_BLOCKS:
            rounded = view(bank.active_rounded, bank.chosen, ROUNDED)[pair]
            round_row(out, group, start // group, start // group + 1, rounded)


@numba.njit
def _expect_outer(bank: Any, part: int, parts: int) -> None:
    """Ask for what `_outer` reads first, so that memory is not idle while the threads meet."""
    matrix, index = view(bank.outer, 1, MATRIX)[0], view(bank.index, bank.chosen, np.int64)
    units = units_of(matrix)
    if by_columns(matrix):
        unit, _ = share(bank.chosen * units, part, parts)
        expect(matrix, index[min(unit // units, bank.chosen - 1)], unit % units, units, _MEANWHILE)
    else:
        first, last = share(units, part, parts)
        if first < last:
            expect(matrix, index[0], first, last, _MEANWHILE)


@numba.njit
def _outer(bank: Any, part: int, parts: int) -> Any:
    """Products of all pairs, summed up; returns the range of outputs that are the part's to finish."""
    matrix, index = view(bank.outer, 1, MATRIX)[0], view(bank.index, bank.chosen, np.int64)
    active = view(bank.active, (bank.chosen, matrix.inputs), np.float32)
    rounded = view(bank.active_rounded, bank.chosen, ROUNDED)
    units, columns = units_of(matrix), by_columns(matrix)
    out = view(bank.outer_sums + (4 * part * matrix.outputs if columns else 0), matrix.outputs, np.float32)
    if not columns:
        first, last = share(units, part, parts)
        out[first * BLOCK : last * BLOCK] = np.float32(0)
        for pair in range(bank.chosen):
            if pair + 1 < bank.chosen:
                expect(matrix, index[pair + 1], first, last, _SOON)
            add_product(matrix, index[pair], active[pair], rounded[pair], first, last, out)
        return min(first * BLOCK, bank.width), min(last * BLOCK, bank.width)
    out[:] = np.float32(0)
    unit, stop = share(bank.chosen * units, part, parts)
    while unit < stop:
        pair = unit // units
        first = unit - pair * units
        last = min(units, first + stop - unit)
        add_product(matrix, index[pair], active[pair], rounded[pair], first, last, out)
        unit += last - first
    barrier()
    return share(bank.width, part, parts)


@numba.njit(fastmath=True)
def _finish(bank: Any, first: int, last: int, parts: int) -> None:
    matrix = view(bank.outer, 1, MATRIX)[0]
    residual, out = view(bank.residual, bank.width, np.float32), view(bank.out, bank.width, np.float32)
    for o in range(first, last):
        out[o] = residual[o]
    for part in range(parts if by_columns(matrix) else 1):
        sums = view(bank.outer_sums + 4 * part * matrix.outputs, matrix.outputs, np.float32)
        for o in range(first, last):
            out[o] += sums[o]
    if bank.outer_bias != 0:
        index, weight = view(bank.index, bank.chosen, np.int64), view(bank.weight, bank.chosen, np.float32)
        for pair in range(bank.chosen):
            bias = view(bank.outer_bias + 4 * index[pair] * bank.width, bank.width, np.float32)
            for o in range(first, last):
                out[o] += weight[pair] * bias[o]


@cache
def bank_step() -> Any:
    """The compiled step: what every thread does with a BANK."""
    code = sources()

    def bank_step(address: Any) -> None:
        code  # noqa: B018  (enclosed, so that numba compares it)
        bank = numba.carray(address, 1, BANK)[0]
        part, parts = thread_number(), num_threads()
        _inner(bank, view(bank.row, view(bank.inner, 1, MATRIX)[0].inputs, np.float32), part, parts)
        _expect_outer(bank, part, parts)
        barrier()
        _middle(bank, part, parts)
        barrier()
        first, last = _outer(bank, part, parts)
        _finish(bank, first, last, parts)

    return compiled(bank_step)
