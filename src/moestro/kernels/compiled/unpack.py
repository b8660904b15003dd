"""4-bit codes that torch packed, as 8-bit integers in the order of a matrix: one pass instead of six."""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from moestro.kernels.compiled.call import Call
from moestro.kernels.compiled.products import share
from moestro.kernels.compiled.sources import compiled, sources
from moestro.kernels.compiled.vectors import num_threads, thread_number, unpack_32, unpack_64

FIELDS = ("code", "multiple", "out", "inputs", "outputs", "group", "lanes")
UNPACK = np.dtype([(name, np.int64) for name in FIELDS])
"""A call, by address: code `[out / (2 lanes), in, lanes]` uint8, multiple `[in / group, out]` int8, out `[in, out]`
int8."""


@numba.njit
def _unpack(call: Any, part: int, parts: int) -> None:
    lanes, outputs = call.lanes, call.outputs
    first, last = share(call.inputs, part, parts)
    for block in range(outputs // (2 * lanes)):
        start = 2 * lanes * block
        for i in range(first, last):
            code = call.code + (block * call.inputs + i) * lanes
            multiple = call.multiple + i // call.group * outputs + start
            if lanes == 32:
                unpack_64(code, multiple, call.out + i * outputs + start)
            else:
                unpack_32(code, multiple, call.out + i * outputs + start)


@cache
def unpack_step() -> Any:
    """The compiled step: what every thread does with an UNPACK."""
    code = sources()

    def unpack_step(address: Any) -> None:
        code  # noqa: B018  (enclosed, so that numba compares it)
        call = numba.carray(address, 1, UNPACK)[0]
        _unpack(call, thread_number(), num_threads())

    return compiled(unpack_step)


def unpack_multiples(code: Tensor, multiple: Tensor, group: int, lanes: int) -> Tensor:
    """Codes less 8, times the multiple of their group.

    Shapes: code `[out, in / 2]` uint8 as torch packed it, multiple `[in / group, out]` int8 -> `[in, out]` int8.
    """
    outputs, half = code.shape
    out = torch.empty(2 * half, outputs, dtype=torch.int8)
    sizes = {"inputs": 2 * half, "outputs": outputs, "group": group, "lanes": lanes}
    call = Call(unpack_step(), UNPACK, torch.get_num_threads(), code=code, multiple=multiple, out=out, **sizes)
    call()
    return out
