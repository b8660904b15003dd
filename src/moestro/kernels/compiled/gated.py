"""What a gated bank does between its products, in one pass over each row: forward and backward.

    forward    h = act(g) u
    backward   h w,   dg = w dh u act'(g),   du = w dh act(g),   dw = <dh, h>        act(z) = z s(z), s the sigmoid

Everything is computed in float32 and rounded once. A row's bits depend on that row only.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from moestro.kernels.compiled.lanes import LANES, Lanes, all_lanes
from moestro.kernels.compiled.sources import compiled, sources
from moestro.kernels.compiled.vectors import pointer


def _forward(short: bool) -> Callable[..., Any]:
    """One block of `h = act(g) u`, by address: g, u, h."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v = Lanes(builder, short)
        gate = v.load(args[0])
        v.store(v.times(gate, v.sigmoid(gate), v.load(args[1])), args[2])
        return context.get_dummy_value()

    return generate


def _backward(short: bool) -> Callable[..., Any]:
    """One block, by address: g, u, dh, h, dg, du; then the weight w, and how many lanes dw leaves out."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v = Lanes(builder, short)
        gate, up, dh = map(v.load, args[:3])
        weight, one = v.spread(args[6]), all_lanes(1.0)
        share = v.sigmoid(gate)
        act = v.times(gate, share)
        h, weighted = v.times(act, up), v.times(dh, weight)
        slope = v.times(share, v.add(one, v.times(gate, v.less(one, share))))
        v.store(v.times(h, weight), args[3])
        v.store(v.times(weighted, up, slope), args[4])
        v.store(v.times(weighted, act), args[5])
        return v.sum_after(v.times(dh, h), args[7])

    return generate


_THREE = types.void(*[types.int64] * 3)
_SIX = types.float32(*[types.int64] * 6, types.float32, types.int32)


@intrinsic
def forward_short(typing: Any, gate: Any, up: Any, h: Any) -> Any:
    """`_forward` in bfloat16."""
    return _THREE, _forward(short=True)


@intrinsic
def forward_float(typing: Any, gate: Any, up: Any, h: Any) -> Any:
    """`_forward` in float32."""
    return _THREE, _forward(short=False)


@intrinsic
def backward_short(
    typing: Any, gate: Any, up: Any, dh: Any, h: Any, d_gate: Any, d_up: Any, weight: Any, skipped: Any
) -> Any:
    """`_backward` in bfloat16."""
    return _SIX, _backward(short=True)


@intrinsic
def backward_float(
    typing: Any, gate: Any, up: Any, dh: Any, h: Any, d_gate: Any, d_up: Any, weight: Any, skipped: Any
) -> Any:
    """`_backward` in float32."""
    return _SIX, _backward(short=False)


Step = Callable[..., None]


@cache
def forward_step(short: bool) -> Step:
    """Rows of `h`, called with addresses and sizes.

        (gate, up, rows, columns, stride of gate and up, out, its stride)

    Strides in bytes; columns at least `LANES`. Rows are bfloat16 if `short`, else float32.
    """
    code, size = sources(), 2 if short else 4
    block = forward_short if short else forward_float

    def forward_step(gate: Any, up: Any, rows: Any, columns: Any, stride: Any, out: Any, out_stride: Any) -> None:
        code  # noqa: B018  (enclosed, so that numba compares it)
        for row in range(rows):
            before, after = row * stride, row * out_stride
            for column in range(0, columns, LANES):
                place = size * min(column, columns - LANES)  # the last ones are found twice if they are too few
                block(gate + before + place, up + before + place, out + after + place)

    return _callable(forward_step, 7)


@cache
def backward_step(short: bool) -> Step:
    """Rows of `h w`, `dg`, `du` and `dw`, called with addresses and sizes.

        (gate, up, rows, columns, their stride, dh, h, stride of dh and h, dg, du, their stride, weight, dw)

    Strides in bytes; columns at least `LANES`; weight and dw float32 `[rows]`, 0 without. Rows are bfloat16 if
    `short`, else float32.
    """
    code, size = sources(), 2 if short else 4
    block = backward_short if short else backward_float

    def backward_step(
        gate: Any, up: Any, rows: Any, columns: Any, stride: Any, dh: Any, h: Any, narrow: Any,
        d_gate: Any, d_up: Any, wide: Any, weight: Any, d_weight: Any,
    ) -> None:  # fmt: skip
        code  # noqa: B018  (enclosed, so that numba compares it)
        for row in range(rows):
            scale, total = np.float32(1), np.float32(0)
            if weight:
                scale = numba.carray(pointer(weight), (rows,), numba.float32)[row]
            inner, middle, outer = row * stride, row * narrow, row * wide
            for column in range(0, columns, LANES):
                start = min(column, columns - LANES)  # the last ones are found twice if they are too few
                place = size * start
                total += block(
                    gate + inner + place, up + inner + place, dh + middle + place, h + middle + place,
                    d_gate + outer + place, d_up + outer + place, scale, np.int32(column - start),
                )  # fmt: skip
            if d_weight:
                numba.carray(pointer(d_weight), (rows,), numba.float32)[row] = total

    return _callable(backward_step, 13)


def _callable(step: Callable[..., None], arguments: int) -> Step:
    """The compiled step as a function of whole numbers, which lets other threads have the interpreter meanwhile."""
    function = compiled(step, types.void(*[types.int64] * arguments))
    kind = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * arguments)
    call = kind(function.address)
    call.kept = function  # type: ignore[attr-defined]
    return call
