"""A back end of fixed shapes: one batched product over padded bins."""

from __future__ import annotations

import torch
from torch import Tensor

from moestro.kernels.grouped import backend


@backend("padded")
def padded(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Grouped matmul as one batched matmul over bins padded to the fullest expert.

    Costs `experts * max_load * width` memory: good when the load is even and experts are many and small.
    Shapes: rows `[rows, width]`, weight `[experts, width, out]`, offsets `[experts + 1]` -> `[rows, out]`.
    """
    load = offsets.diff()
    expert = torch.arange(len(weight), device=rows.device).repeat_interleave(load, output_size=len(rows))
    place = torch.arange(len(rows), device=rows.device) - offsets[expert]
    deepest = int(load.max()) if len(rows) else 0
    cell = expert * deepest + place
    bins = rows.new_zeros(len(weight) * deepest, rows.shape[1]).index_copy(0, cell, rows)
    filled = bins.view(len(weight), deepest, rows.shape[1]) @ weight
    return filled.flatten(0, 1).index_select(0, cell)
