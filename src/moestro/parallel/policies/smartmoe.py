"""SmartMoE: which layouts to choose among is decided beforehand, which placement of experts as it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from moestro.parallel.costs import LayerCost
from moestro.parallel.loads import Load, load_shares, load_table
from moestro.parallel.mesh import MeshShape
from moestro.parallel.placement import Placement
from moestro.parallel.policies.base import Cluster
from moestro.parallel.policies.plain import greedy

MOST_EXACT = 12  # experts whose placements are searched through


def smartmoe(
    history: Load, cluster: Cluster, current: Placement | None = None, pool: Sequence[Placement] = ()
) -> Placement:
    """The placement without replicas whose busiest rank has least to do, if better than the current one.

    Zhai et al. 2023: of a pool of placements that was found beforehand and what is found now, the best; it is
    adopted if the busiest rank has less to do than where experts are. Of up to 12 experts the best of all
    placements is found (a dynamic programme over subsets), of more `greedy` finds one.

    Args:
        history: what experts had to do.
        cluster: without replicas.
        current: where they are; kept among equals.
        pool: more candidates, see `layout_pools`.

    Raises:
        ValueError: sizes that do not fit.
    """
    load = load_shares(history).mean(0)
    found = greedy(history, cluster, current)
    tried = [] if current is None or len(current.expert_of_slot) != len(load) else [current]
    tried += [*pool, found]
    if len(load) <= MOST_EXACT:
        tried.append(best_placement(load, cluster.ranks, current))
    return min(tried, key=lambda each: round(max(each.load_per_rank(load.tolist())), 12))


def best_placement(load: np.ndarray, ranks: int, current: Placement | None = None) -> Placement:
    """The placement without replicas whose busiest rank has the least load, by going through all subsets.

    Which rank gets which experts is free; each gets those of which it has most already.
    """
    room = Placement.contiguous(len(load), ranks).slots_per_rank
    everything = (1 << len(load)) - 1
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # by experts placed: busiest, last group
    for _ in range(ranks):
        following: dict[int, tuple[float, tuple[int, ...]]] = {}
        for placed, (busiest, _group) in best.items():
            if placed.bit_count() % room or placed == everything:
                continue
            first, *rest = [expert for expert in range(len(load)) if not placed >> expert & 1]
            for others in combinations(rest, room - 1):
                group = (first, *others)
                after = placed | sum(1 << expert for expert in group)
                worst = max(busiest, float(load[list(group)].sum()))
                if worst < following.get(after, best.get(after, (np.inf, ())))[0]:
                    following[after] = worst, group
        best |= following
    groups, placed = [], everything
    while placed:
        groups.append(best[placed][1])
        placed -= sum(1 << expert for expert in groups[-1])
    return _labelled(groups, current)


def _labelled(groups: Sequence[tuple[int, ...]], current: Placement | None) -> Placement:
    """Each group to the rank that holds most of it, the fullest agreement first."""
    here = [set[int]() if current is None else set(current.experts_of(rank)) for rank in range(len(groups))]
    pairs = [
        (-len(here[rank] & set(group)), rank, number)
        for number, group in enumerate(groups)
        for rank in range(len(groups))
    ]
    taken: dict[int, int] = {}
    for _, rank, number in sorted(pairs):
        if rank not in taken and number not in taken.values():
            taken[rank] = number
    held = tuple(expert for rank in range(len(groups)) for expert in groups[taken[rank]])
    return Placement(held, len(held), len(groups))


@dataclass(frozen=True)
class Pool:
    """Placements of one layout, among which experts can be moved cheaply as a run goes on.

    Attributes:
        shape: processes by axis.
        seconds: what a step of one layer costs, expected over the loads.
        imbalance: largest over mean load of a rank, expected likewise.
        placements: candidates for `smartmoe`, each the best of a part of the loads.
    """

    shape: MeshShape
    seconds: float
    imbalance: float
    placements: tuple[Placement, ...]


def layout_pools(loads: Load, ranks: int, cost: LayerCost, *, nodes: int = 1, parts: int = 4) -> list[Pool]:
    """Every layout of `ranks` processes, the one with the least expected cost first (Zhai et al. 2023, offline).

    The cost of a layer's step depends on the data: it is that of the busiest rank, with the placement that this
    part of the loads asks for: its products, its rows' journeys, gathering and adding up rows over `tensor`, and
    adding up gradients over `data`.

    Args:
        loads: expected loads, `[steps, experts]` in tokens of all ranks; of a run before, or drawn.
        ranks: processes.
        cost: of the layer.
        nodes: machines with equal numbers of ranks; ranks of an expert group are neighbours.
        parts: consecutive parts of the loads, each of which gives a candidate.

    Raises:
        ValueError: no tokens, or fewer loads than parts.
    """
    table = load_table(loads)
    if not table.sum() or len(table) < parts or parts < 1:
        raise ValueError(f"{len(table)} steps with {table.sum():g} tokens do not make {parts} parts")
    found = []
    for expert in (n for n in range(1, ranks + 1) if ranks % n == table.shape[1] % n == 0):
        for tensor in (n for n in range(1, ranks // expert + 1) if ranks // expert % n == 0):
            found.append(_pool(table, MeshShape.fitting(ranks, expert=expert, tensor=tensor), cost, nodes, parts))
    return sorted(found, key=lambda pool: pool.seconds)


def _pool(table: np.ndarray, shape: MeshShape, cost: LayerCost, nodes: int, parts: int) -> Pool:
    pieces = np.array_split(table, parts)
    placed = [smartmoe(piece, Cluster(shape.expert)) for piece in pieces]
    busiest = np.array(
        [
            max(placement.load_per_rank(load))
            for piece, placement in zip(pieces, placed, strict=True)
            for load in piece.tolist()
        ]
    )
    mean = table.sum(1) / shape.expert
    per_node = shape.ranks // nodes
    link = cost.inside if shape.expert * shape.tensor <= per_node else cost.between
    rows = float(busiest.mean()) / shape.data  # of the busiest rank, all of whose slices have them
    row_bytes = cost.width * cost.number_bytes
    products = 3 * cost.row_seconds * rows / shape.tensor
    journeys = 4 * rows / shape.tensor * row_bytes * (shape.expert - 1) / shape.expert / link
    slices = 4 * rows * row_bytes * (shape.tensor - 1) / shape.tensor / cost.inside
    weights = table.shape[1] / shape.expert * cost.parameters / shape.tensor * cost.number_bytes
    gradients = (
        2 * weights * (shape.data - 1) / shape.data / (cost.inside if shape.ranks <= per_node else cost.between)
    )
    seconds = products + journeys + slices + gradients
    return Pool(shape, seconds, float((busiest / np.maximum(mean, 1e-300)).mean()), tuple(dict.fromkeys(placed)))
