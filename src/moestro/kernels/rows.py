"""Memory for the rows of a chunk, used again for the next."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moestro.kernels.plan import Chunk


class Scratch:
    """Named blocks of rows; contents do not outlive a chunk.

    Args:
        like: says dtype and device.
        rows: of the longest chunk.
        columns: of each block.
    """

    def __init__(self, like: Tensor, rows: int, columns: Mapping[str, int]) -> None:
        self._blocks = {name: like.new_empty(rows, count) for name, count in columns.items()}

    def __call__(self, name: str, chunk: Chunk) -> Tensor:
        """The block of that name, `[rows of the chunk, columns]`."""
        return self._blocks[name][: chunk.stop - chunk.start]


def picked(x: Tensor, source: Tensor | None, chunk: Chunk, into: Tensor) -> Tensor:
    """The rows of `x` that a chunk works on: copied as `source [rows]` says, or its own slice if that is None."""
    if source is None:
        return x[chunk.start : chunk.stop]
    torch.index_select(x, 0, source[chunk.start : chunk.stop], out=into)
    return into


def clear_filling(filling: Tensor, chunk: Chunk, *blocks: Tensor) -> None:
    """Zero those rows of a chunk's blocks that only fill a group up; `filling [rows]` bool."""
    rows = filling[chunk.start : chunk.stop].nonzero().squeeze(1)
    for block in blocks:
        block.index_fill_(0, rows, 0)
