"""How a fused bank walks through its rows: which experts together, and how many rows each product gets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

CHUNK = 1024  # rows that are gathered and activated together: they stay in the cache between two products
CHUNKS_PER_THREAD = 8  # at least, where experts are small enough: so that threads end together
TILE = 32


@dataclass(frozen=True)
class Rounding:
    """Row counts that products may have.

    Attributes:
        up: the next allowed count.
        step: allowed counts are at most so far apart.
        tile: rows of one product; None = all rows of an expert at once.
    """

    up: Callable[[int], int]
    step: int
    tile: int | None = None

    def __call__(self, count: int) -> int:
        return self.up(count)


@dataclass(frozen=True)
class Chunk:
    """Neighbouring experts whose rows are handled together.

    Attributes:
        start: first row of the chunk.
        stop: row after the last.
        experts: those with rows, in order.
        sizes: rows of each, rounded up.
        tile: rows of one product; None = all rows of an expert at once.
    """

    start: int
    stop: int
    experts: list[int]
    sizes: list[int]
    tile: int | None = None

    def groups(self, *rows: Tensor) -> Iterator[tuple[Any, ...]]:
        """(expert, its slice of each argument), for products that sum over rows."""
        return zip(self.experts, *(each.split(self.sizes) for each in rows), strict=True)

    def pieces(self, *rows: Tensor) -> Iterator[tuple[Any, ...]]:
        """(expert, rows of one product of each argument), for products that keep rows apart."""
        if self.tile is None:
            return self.groups(*rows)
        experts = [e for e, size in zip(self.experts, self.sizes, strict=True) for _ in range(size // self.tile)]
        return zip(experts, *(each.split(self.tile) for each in rows), strict=True)

    def rowwise(self, function: Callable[..., object], *rows: Tensor) -> None:
        """Apply an element-wise function to whole rows."""
        if self.tile is None:
            function(*rows)
            return
        # a vector loop and its remainder may round differently, and threads begin in the middle of a row:
        # rows one by one, below the size that threads share, meet neither
        for pieces in zip(*(each.unbind(0) for each in rows), strict=True):
            function(*pieces)


@dataclass(frozen=True, eq=False)
class Plan:
    """Where every pair of token and expert lies once the groups are rounded up.

    The rows that fill a group up repeat its first token with weight zero, so that nothing but the group's own
    tokens can reach its sums, not even as zero times infinity.

    Attributes:
        chunks: in order.
        place: row of each pair, `[pairs]`; None where rows and pairs are the same.
        source: pair that each row repeats, `[rows]`; None likewise.
        rows: number of rows.
    """

    chunks: list[Chunk]
    place: Tensor | None
    source: Tensor | None
    rows: int

    def spread(self, per_pair: Tensor) -> Tensor:
        """Values of pairs as values of rows; a row that fills up gets that of its group's first pair."""
        return per_pair if self.source is None else per_pair.index_select(0, self.source)

    def spread_weight(self, weight: Tensor) -> Tensor:
        """Weights of pairs as weights of rows; a row that fills up gets zero."""
        if self.place is None:
            return weight
        return weight.new_zeros(self.rows).index_copy_(0, self.place, weight)

    def filling(self) -> Tensor | None:
        """True for rows that only fill a group up, `[rows]`; None if there are none."""
        if self.place is None:
            return None
        return torch.ones(self.rows, dtype=torch.bool).index_fill_(0, self.place, False)

    def place_of(self, pairs: Tensor) -> Tensor:
        """Rows of these pairs."""
        return pairs if self.place is None else self.place.index_select(0, pairs)

    def collect(self, per_row: Tensor) -> Tensor:
        """Values of rows as values of pairs."""
        return per_row if self.place is None else per_row.index_select(0, self.place)


def make_plan(offsets: Tensor, rounding: Rounding, threads: int = 1) -> Plan:
    """The plan for groups that begin at `offsets [experts + 1]`, in chunks for so many threads."""
    bounds = offsets.tolist()
    counts = [stop - start for start, stop in pairwise(bounds)]
    sizes = [rounding(count) if count else 0 for count in counts]
    rows = sum(sizes)
    most = CHUNK if threads == 1 else min(CHUNK, rows // (threads * CHUNKS_PER_THREAD))
    chunks = _chunks(sizes, rounding.tile, most)
    if sizes == counts:
        return Plan(chunks, None, None, rows)
    size, count = torch.tensor(sizes), torch.tensor(counts)
    shift = (size.cumsum(0) - size) - offsets[:-1]
    pair = torch.arange(bounds[-1])
    place = pair + shift.repeat_interleave(count, output_size=bounds[-1])
    source = offsets[:-1].repeat_interleave(size, output_size=rows)
    source[place] = pair
    return Plan(chunks, place, source, rows)


def _chunks(sizes: list[int], tile: int | None, most: int) -> list[Chunk]:
    """Neighbours together, up to so many rows; an expert with more is a chunk of its own."""
    chunks, experts, start, row = [], list[int](), 0, 0
    for expert, size in enumerate(sizes):
        if experts and row + size - start > most:
            chunks.append(Chunk(start, row, experts, [sizes[e] for e in experts], tile))
            experts, start = [], row
        if size:
            experts.append(expert)
            row += size
    if experts:
        chunks.append(Chunk(start, row, experts, [sizes[e] for e in experts], tile))
    return chunks


def most_rows(pairs: int, num_experts: int, rounding: Rounding) -> int:
    """A bound on the rows of a plan that does not depend on who chose whom."""
    most: int = pairs + (rounding.step - 1) * torch.sym_min(pairs, num_experts)
    return most


def _few_sizes(count: int) -> int:
    """1, 2, 4, then multiples of 4 to 128, of 8 to 1024 and of 16 beyond."""
    if count <= 4:
        return 1 << (count - 1).bit_length()
    step = 4 if count <= 128 else 8 if count <= 1024 else 16
    return -(-count // step) * step


# For libraries that do not compile a kernel per shape.
EXACT = Rounding(lambda count: count, step=1)

# oneDNN compiles a bfloat16 product per shape (0.3 ms, as long as 64 rows take), and routing gives an expert
# another number of rows at every step. Few sizes are compiled once; they waste 3 % of the work at 64 rows an
# expert and below 1 % at 512.
FEW_SIZES = Rounding(_few_sizes, step=16)

# Every product has the same number of rows, so that a row's bits cannot depend on how many others came along.
TILES = Rounding(lambda count: -(-count // TILE) * TILE, step=TILE, tile=TILE)


ROUNDINGS = {"exact": EXACT, "few_sizes": FEW_SIZES, "tiles": TILES}


def rounding_for(dtype: torch.dtype) -> str:
    """The name of the rounding that makes products of this dtype fast on a CPU."""
    return "exact" if dtype in (torch.float32, torch.float64) else "few_sizes"
