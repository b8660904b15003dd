"""The plain back end: one matrix product per expert."""

from __future__ import annotations

import torch
from torch import Tensor

from moestro.kernels.grouped import backend


@backend("loop")
def loop(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Grouped matmul as a Python loop over experts.

    Any size and dtype; costs one small kernel per expert and one read of `offsets` on the host. `split` and
    `unbind`, unlike indexing, give a backward that is linear in the number of experts.
    Shapes: rows `[rows, width]`, weight `[experts, width, out]`, offsets `[experts + 1]` -> `[rows, out]`.
    """
    groups = rows.split(offsets.diff().tolist())
    return torch.cat([group @ matrix for group, matrix in zip(groups, weight.unbind(0), strict=True)])
