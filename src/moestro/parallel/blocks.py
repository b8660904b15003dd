"""Rows in blocks, and the same rows with the blocks in another order."""

from __future__ import annotations

import torch
from torch import Tensor


def block_order(sizes: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Where each row comes from when blocks change their order.

    Args:
        sizes: rows of each block, in as many dimensions as the order of blocks has, the last running fastest.
        dims: the new order of these dimensions, as in `permute`.

    Returns: for each row of the new order its place in the old one, `[rows]`.
    """
    flat = sizes.flatten()
    starts = (flat.cumsum(0) - flat).view_as(sizes).permute(dims).flatten()
    lengths = sizes.permute(dims).flatten()
    shift = starts - (lengths.cumsum(0) - lengths)
    return shift.repeat_interleave(lengths) + torch.arange(int(flat.sum()), device=sizes.device)


def offsets_of(load: Tensor) -> Tensor:
    """Where groups of these sizes begin, and the last ends. `[groups]` -> `[groups + 1]`."""
    return torch.cat([load.new_zeros(1), load.cumsum(0)])


def permuted(rows: Tensor, order: Tensor, inverse: bool = False) -> Tensor:
    """`rows[order]`, or the rows of which that made these."""
    if inverse:
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        order = back
    return rows.index_select(0, order)


def filled_up(order: Tensor, sizes: Tensor, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    """Groups of rows filled up to multiples of a number by repeating the first row of each; empty ones stay empty.

    Args:
        order: for each row, grouped, its place before.
        sizes: rows of each group.
        multiple: of the new sizes.

    Returns: for each row of the new groups its place before; for each row before its place in the new groups, where
        it is not one that fills; and the new sizes.
    """
    full = -(-sizes // multiple) * multiple
    first = sizes.cumsum(0) - sizes
    shift = full.cumsum(0) - full - first
    place = torch.arange(len(order), device=order.device) + shift.repeat_interleave(sizes)
    source = order[first.repeat_interleave(full)]
    source[place] = order
    where = torch.empty_like(order)
    where[order] = place
    return source, where, full


def parts_of(load: Tensor, parts: int) -> Tensor:
    """Every block in parts as equal as can be: `load` -> `[parts, *load]`."""
    bounds = torch.arange(parts + 1, device=load.device).view(-1, *[1] * load.dim()) * load // parts
    return bounds.diff(dim=0)
