"""One linear map of one row, as one call."""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np

from moestro.kernels.compiled.products import (
    MATRIX,
    NIBBLE_BLOCKS,
    ROUNDED,
    gather,
    round_row,
    spread,
    view,
)
from moestro.kernels.compiled.sources import compiled, sources
from moestro.kernels.compiled.vectors import num_threads, thread_number

LINEAR = np.dtype([(name, np.int64) for name in ("row", "matrix", "rounded", "sums")])
"""A call, by address: row `[in]` float32 with padding, a MATRIX record, a ROUNDED record per part, and sums
`[parts or 1, out]` float32, whose first row is the product."""


@cache
def linear_step() -> Any:
    """The compiled step: what every thread does with a LINEAR."""
    code = sources()

    def linear_step(address: Any) -> None:
        code  # noqa: B018  (enclosed, so that numba compares it)
        call = numba.carray(address, 1, LINEAR)[0]
        part, parts = thread_number(), num_threads()
        matrix, rounded = view(call.matrix, 1, MATRIX)[0], view(call.rounded, parts, ROUNDED)[part]
        row = view(call.row, matrix.inputs, np.float32)
        if matrix.kind == NIBBLE_BLOCKS:
            round_row(row, matrix.group, 0, matrix.inputs // matrix.group, rounded)
        first, last = spread(matrix, 0, row, rounded, call.sums, part, parts)
        gather(matrix, call.sums, first, last, parts)

    return compiled(linear_step)
