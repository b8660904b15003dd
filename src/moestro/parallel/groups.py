"""Groups of ranks by mixed-radix numbering, as Megatron-Core orders them (Liu et al. 2025)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import product
from math import prod


def rank_groups(sizes: Mapping[str, int], axes: Collection[str]) -> list[list[int]]:
    """The groups of ranks that differ in some axes only.

        rank = sum_j index_j * stride_j,   stride_0 = 1,   stride_{j+1} = stride_j * size_j

    Args:
        sizes: ranks along each axis, the axis of the smallest stride first.
        axes: those along which the ranks of a group differ; the groups are numbered by the other axes, and the
            ranks inside one by these, in both the first named running fastest.

    Raises:
        ValueError: an axis without a size, or a size below 1.
    """
    unknown = [axis for axis in axes if axis not in sizes]
    if unknown or any(size < 1 for size in sizes.values()):
        raise ValueError(f"axes {', '.join(axes)} need sizes of at least 1, got {dict(sizes)}")
    names = list(sizes)
    stride = {name: prod(sizes[other] for other in names[:place]) for place, name in enumerate(names)}

    def offsets(along: list[str]) -> list[int]:
        slowest_first = product(*(range(sizes[name]) for name in reversed(along)))
        return [sum(i * stride[n] for i, n in zip(index, reversed(along), strict=True)) for index in slowest_first]

    inside = offsets([name for name in names if name in axes])
    return [[base + each for each in inside] for base in offsets([name for name in names if name not in axes])]
