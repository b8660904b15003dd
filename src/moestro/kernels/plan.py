"""How a fused bank walks through its rows: which experts together, and how many rows each product gets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

CHUNK = 1024  # rows that are gathered and activated together: they stay in the cache between two products
CHUNKS_PER_THREAD = 8  # at least, where experts are small enough: so that threads end together
TILE = 32
REMEMBERED = 2**15  # pairs of a plan that is worth keeping for the backward: a larger one takes little of its time
BATCH = 2048  # rows of a batched chunk at most: a quarter of all rows, but no fewer than half as many as this
WASTE = 1 / 8  # of the rows of a batched chunk may be there to make its experts equal


@dataclass(frozen=True)
class Rounding:
    """Row counts that products may have.

    Attributes:
        up: the next allowed count.
        step: allowed counts are at most so far apart.
        tile: rows of one product; None = all rows of an expert at once.
        batched: whether experts of about equally many rows get equally many, and come next to each other.
    """

    up: Callable[[int], int]
    step: int
    tile: int | None = None
    batched: bool = False

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
        index: in a batched chunk, where all have equally many rows so that one product serves all, the experts once
            more, `[experts]`; else None.
    """

    start: int
    stop: int
    experts: list[int]
    sizes: list[int]
    tile: int | None = None
    index: Tensor | None = None

    def batch(self, rows: Tensor) -> Tensor:
        """Rows of a batched chunk as `[experts, rows of each, columns]`."""
        return rows.unflatten(0, (len(self.experts), self.sizes[0]))

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
    """The plan for groups that begin at `offsets [experts + 1]`, in chunks for so many threads.

    Where rows lie does not depend on the threads: a backward may have others than its forward.
    """
    bounds = tuple(offsets.tolist())
    return (_remembered if bounds[-1] <= REMEMBERED else _planned)(bounds, rounding, threads)


@torch.inference_mode(False)  # what is remembered serves training too
def _planned(bounds: tuple[int, ...], rounding: Rounding, threads: int) -> Plan:
    offsets = torch.tensor(bounds)
    counts = [stop - start for start, stop in pairwise(bounds)]
    if rounding.batched:
        return _batched_plan(offsets, counts, rounding)
    sizes = [rounding(count) if count else 0 for count in counts]
    rows = sum(sizes)
    most = CHUNK if threads == 1 else min(CHUNK, rows // (threads * CHUNKS_PER_THREAD))
    chunks = _chunks(sizes, rounding.tile, most)
    if sizes == counts:
        return Plan(chunks, None, None, rows)
    return Plan(chunks, *_places(offsets, counts, range(len(counts)), sizes), rows)


_remembered = lru_cache(64)(_planned)  # a backward wants its forward's, of every layer; about 40 MB at most


def _places(offsets: Tensor, counts: list[int], order: Sequence[int], sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Place and source of a plan whose experts come in this order and with these sizes."""
    size, count = torch.tensor(sizes, dtype=torch.long), torch.tensor(counts, dtype=torch.long)
    first = offsets[:-1]
    chosen = torch.tensor(order, dtype=torch.long)
    shift = torch.zeros_like(first).index_copy_(0, chosen, size.cumsum(0) - size) - first
    place = torch.arange(sum(counts)) + shift.repeat_interleave(count, output_size=sum(counts))
    source = first[chosen].repeat_interleave(size, output_size=sum(sizes))
    source[place] = torch.arange(sum(counts))
    return place, source


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


def _batched_plan(offsets: Tensor, counts: list[int], rounding: Rounding) -> Plan:
    """Experts with the most rows first, those with about as many together."""
    order = sorted((e for e, count in enumerate(counts) if count), key=lambda e: -counts[e])
    chunks, row, number = list[Chunk](), 0, 0
    most = max(BATCH // 2, min(BATCH, sum(counts) // 4))
    while number < len(order):
        size = rounding(counts[order[number]])
        together = _about_equal([counts[e] for e in order[number:]], size, most)
        experts = order[number : number + together]
        stop = row + size * together
        chunks.append(Chunk(row, stop, experts, [size] * together, index=torch.tensor(experts)))
        row, number = stop, number + together
    sizes = [size for chunk in chunks for size in chunk.sizes]
    return Plan(chunks, *_places(offsets, counts, order, sizes), row)


def _about_equal(counts: list[int], size: int, most: int) -> int:
    """How many of these falling counts fit `most` rows with `size` for each and little waste; a power of two."""
    number = 1
    while 2 * number <= len(counts) and 2 * number * size <= most:
        if 2 * number * size > (1 + WASTE) * sum(counts[: 2 * number]):
            break
        number *= 2
    return number


def most_rows(pairs: int, num_experts: int, rounding: Rounding) -> int:
    """A bound on the rows of a plan that does not depend on who chose whom."""
    most: int = pairs + (rounding.step - 1) * torch.sym_min(pairs, num_experts)
    return most + pairs // round(1 / WASTE) if rounding.batched else most


def _few_sizes(count: int) -> int:
    """1, 2, 4, then multiples of 4 to 128, of 8 to 1024 and of 16 beyond."""
    if count <= 4:
        return 1 << (count - 1).bit_length()
    step = 4 if count <= 128 else 8 if count <= 1024 else 16
    return -(-count // step) * step


def _fewer_sizes(count: int) -> int:
    """Multiples of 4 to 128, then 16 sizes from each power of two to the next."""
    step = max(4, 1 << max(0, (count - 1).bit_length() - 5))
    return -(-count // step) * step


# For libraries that do not compile a kernel per shape.
EXACT = Rounding(lambda count: count, step=1)

# oneDNN compiles a bfloat16 product per shape (0.3 ms, as long as 64 rows take), and routing gives an expert
# another number of rows at every step. Few sizes are compiled once; they waste 3 % of the work at 64 rows an
# expert and below 1 % at 512.
FEW_SIZES = Rounding(_few_sizes, step=16)

# Every product has the same number of rows, so that a row's bits cannot depend on how many others came along.
TILES = Rounding(lambda count: -(-count // TILE) * TILE, step=TILE, tile=TILE)


# Products of small experts take no longer than the call of one: several experts share a product.
BATCHES = Rounding(_fewer_sizes, step=4, batched=True)
SMALL = 2**17  # elements of a matrix, below which copying it costs little beside its products

ROUNDINGS = {"exact": EXACT, "few_sizes": FEW_SIZES, "tiles": TILES, "batches": BATCHES}


def rounding_for(dtype: torch.dtype, elements: int) -> str:
    """The name of the rounding that makes products of this dtype with matrices of this size fast on a CPU."""
    if elements <= SMALL:
        return "batches"
    return "exact" if dtype in (torch.float32, torch.float64) else "few_sizes"
