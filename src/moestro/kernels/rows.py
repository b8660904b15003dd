"""Memory for the rows of a chunk, used again for the next."""

from __future__ import annotations

import torch
from torch import Tensor

from moestro.kernels.plan import Chunk, Plan


class Scratch:
    """Named blocks of rows, as long as the largest chunk; contents do not outlive a chunk.

    Args:
        like: says dtype and device.
        plan: whose chunks will use it.
    """

    def __init__(self, like: Tensor, plan: Plan) -> None:
        self._like, self._blocks = like, dict[str, Tensor]()
        self._rows = max((chunk.stop - chunk.start for chunk in plan.chunks), default=0)

    def __call__(self, name: str, columns: int) -> Tensor:
        """The block of that name, `[rows of the largest chunk, columns]`."""
        if name not in self._blocks:
            self._blocks[name] = self._like.new_empty(self._rows, columns)
        return self._blocks[name]


def picked(x: Tensor, source: Tensor | None, chunk: Chunk, into: Tensor) -> Tensor:
    """The rows of `x` that a chunk works on: copied as `source [rows]` says, or its own slice if that is None."""
    if source is None:
        return x[chunk.start : chunk.stop]
    block = into[: chunk.stop - chunk.start]
    torch.index_select(x, 0, source[chunk.start : chunk.stop], out=block)
    return block


def clear_filling(filling: Tensor, chunk: Chunk, *blocks: Tensor) -> None:
    """Zero those rows of a chunk's blocks that only fill a group up; `filling [rows]` bool."""
    rows = filling[chunk.start : chunk.stop].nonzero().squeeze(1)
    for block in blocks:
        block.index_fill_(0, rows, 0)
