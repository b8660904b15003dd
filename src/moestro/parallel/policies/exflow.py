"""ExFlow: experts of consecutive layers that tokens use together share a rank, so that tokens stay."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from moestro.parallel.assignment import balanced_assignment
from moestro.parallel.placement import Placement
from moestro.parallel.policies.base import Cluster


def pair_counts(primary: np.ndarray | Sequence[Sequence[int]], num_experts: int) -> np.ndarray:
    """How many tokens go from an expert to an expert of the next layer.

    Shapes: primary `[layers, tokens]`, the expert that each token prefers in each layer -> `[layers - 1, experts,
        experts]`.

    Raises:
        ValueError: fewer than two layers, or experts that do not exist.
    """
    trace = np.asarray(primary, dtype=np.int64)
    if trace.ndim != 2 or len(trace) < 2:
        raise ValueError(f"a trace is [layers, tokens] with two layers at least, got {list(trace.shape)}")
    if trace.size and not 0 <= trace.min() <= trace.max() < num_experts:
        raise ValueError(f"a trace names experts {trace.min()} to {trace.max()}, but there are {num_experts}")
    codes = trace[:-1] * num_experts + trace[1:]
    counts = [np.bincount(code, minlength=num_experts * num_experts) for code in codes]
    return np.stack(counts).reshape(-1, num_experts, num_experts)


def moving_share(pairs: np.ndarray, placements: Sequence[Placement], nodes: int = 1) -> tuple[float, float]:
    """Shares of all steps from layer to layer that lead to another rank, and to another node."""
    ranks, per_node = placements[0].ranks, placements[0].ranks // nodes
    where = np.stack([_ranks(placement) for placement in placements])
    apart = sum(_crossing(table, *both) for table, both in zip(pairs, _neighbours(where), strict=True))
    far = sum(_crossing(table, *both) for table, both in zip(pairs, _neighbours(where // per_node), strict=True))
    total = max(int(pairs.sum()), 1)
    assert ranks % nodes == 0
    return apart / total, far / total


def exflow(
    pairs: np.ndarray,
    cluster: Cluster,
    current: Sequence[Placement] | None = None,
    *,
    starts: int = 4,
    seed: int = 0,
) -> list[Placement]:
    """A placement of every layer such that few tokens change their rank between layers; no replicas.

        max sum_l sum_ee' A_l[e, e'] 1{rank_l(e) = rank_l+1(e')},   as many experts on every rank

    Yao et al. 2024: first over nodes, then inside each node over its ranks. They solve the integer programme with
    Gurobi; here a layer's best placement between its neighbours is an assignment, which is solved exactly, and
    layers take turns, forwards and backwards, until none gets better. The best of several starts is taken, one of
    which is the current placement: the result never costs more than it does, 1 for a step to another rank of the
    node and 2 for one to another node.

    Args:
        pairs: from `pair_counts`, `[layers - 1, experts, experts]`; of a router that takes several experts,
            those it prefers.
        cluster: without replicas.
        current: of every layer; None = in order.
        starts: with the first layer's experts shuffled, beside the current placement.
        seed: of that shuffling.

    Raises:
        ValueError: counts of another shape, slots for replicas, or experts that ranks cannot share evenly.
    """
    layers, experts = _sizes(pairs, cluster)
    if cluster.ranks % cluster.nodes:
        raise ValueError(f"{cluster.ranks} ranks cannot be shared evenly by {cluster.nodes} nodes")
    in_order = Placement.contiguous(experts, cluster.ranks)
    start = np.stack([_ranks(placement) for placement in current or [in_order] * layers])
    per_node = cluster.ranks // cluster.nodes
    if cluster.nodes > 1:
        node_of = _best(pairs, start // per_node, cluster.nodes, starts, seed)
    else:
        node_of = np.zeros_like(start)
    inside = np.zeros_like(start)
    for node in range(cluster.nodes):
        chosen = [np.flatnonzero(each == node) for each in node_of]
        part = np.stack([table[np.ix_(*both)] for table, both in zip(pairs, _neighbours(chosen), strict=True)])
        found = _best(part, _start_inside(start, chosen, node, per_node), per_node, starts, seed)
        for layer, members in enumerate(chosen):
            inside[layer, members] = found[layer]
    found = node_of * per_node + inside
    if _cost(pairs, found, per_node) > _cost(pairs, start, per_node):
        found = start
    return [Placement(tuple(np.argsort(each, kind="stable").tolist()), experts, cluster.ranks) for each in found]


def _best(pairs: np.ndarray, start: np.ndarray, bins: int, starts: int, seed: int) -> np.ndarray:
    """The bin of every expert of every layer, `[layers, experts]`, from the best of several starts."""
    if bins == 1:
        return np.zeros_like(start)
    chance = np.random.default_rng(seed)
    tried = [_improved(pairs, start.copy(), bins)]
    for _ in range(starts):
        tried.append(_improved(pairs, _chain(pairs, chance.permutation(start[0]), bins), bins))
    return max(tried, key=lambda where: _kept(pairs, where))


def _chain(pairs: np.ndarray, first: np.ndarray, bins: int) -> np.ndarray:
    """Each layer in turn where the one before it wants it."""
    where = [first]
    for table in pairs:
        where.append(balanced_assignment(table.T @ _one_hot(where[-1], bins)))
    return np.stack(where)


def _improved(pairs: np.ndarray, where: np.ndarray, bins: int) -> np.ndarray:
    """Layers take turns, forwards and backwards, each placed best between its neighbours, while that gains."""
    layers, kept = len(where), -1
    while (now := _kept(pairs, where)) > kept:
        kept = now
        for layer in [*range(layers), *range(layers - 2, -1, -1)]:
            value = np.zeros((where.shape[1], bins))
            if layer:
                value += pairs[layer - 1].T @ _one_hot(where[layer - 1], bins)
            if layer < layers - 1:
                value += pairs[layer] @ _one_hot(where[layer + 1], bins)
            where[layer] = balanced_assignment(value)
    return where


def _start_inside(start: np.ndarray, chosen: Sequence[np.ndarray], node: int, per_node: int) -> np.ndarray:
    """Experts of a node where they are, if they are all there; else in order."""
    room = len(chosen[0]) // per_node
    if all((start[layer, members] // per_node == node).all() for layer, members in enumerate(chosen)):
        return np.stack([start[layer, members] % per_node for layer, members in enumerate(chosen)])
    return np.stack([np.arange(len(members)) // room for members in chosen])


def _one_hot(bins_of: np.ndarray, bins: int) -> np.ndarray:
    return np.eye(bins)[bins_of]


def _neighbours(layers: Sequence[np.ndarray] | np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(pairwise(layers))


def _kept(pairs: np.ndarray, where: np.ndarray) -> int:
    """Steps between layers that stay in their bin."""
    return int(pairs.sum()) - sum(
        _crossing(table, *both) for table, both in zip(pairs, _neighbours(where), strict=True)
    )


def _crossing(table: np.ndarray, here: np.ndarray, there: np.ndarray) -> int:
    return int(table[here[:, None] != there[None, :]].sum())


def _cost(pairs: np.ndarray, where: np.ndarray, per_node: int) -> int:
    """1 for a step to another rank of the node, 2 for one to another node."""
    moved = [
        sum(_crossing(t, *both) for t, both in zip(pairs, _neighbours(each), strict=True))
        for each in (where, where // per_node)
    ]
    return sum(moved)


def _ranks(placement: Placement) -> np.ndarray:
    """The rank of every expert; ValueError for replicas."""
    if len(placement.expert_of_slot) != placement.num_experts:
        raise ValueError("exflow places every expert once; pass placements without replicas")
    where = np.empty(placement.num_experts, dtype=np.int64)
    where[list(placement.expert_of_slot)] = np.arange(placement.num_experts) // placement.slots_per_rank
    return where


def _sizes(pairs: np.ndarray, cluster: Cluster) -> tuple[int, int]:
    """Layers and experts."""
    if pairs.ndim != 3 or pairs.shape[1] != pairs.shape[2] or not len(pairs):
        raise ValueError(f"pairs are [layers - 1, experts, experts], from pair_counts; got {list(pairs.shape)}")
    if cluster.slots not in (None, pairs.shape[1]):
        raise ValueError(f"exflow places every expert once; leave slots out, or pass {pairs.shape[1]}")
    return len(pairs) + 1, pairs.shape[1]
