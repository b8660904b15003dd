"""DeepSeek's expert-parallel load balancer: which experts get replicas, and which rank holds what."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moestro.parallel.placement import Placement


def eplb(
    load: Sequence[float], *, ranks: int, slots: int | None = None, nodes: int = 1, groups: int = 1
) -> Placement:
    """Spread the experts of one layer so that ranks have nearly equal work.

        1. expert groups are packed on nodes, heaviest first;
        2. in each node, one slot after another goes to the expert with the most load per replica;
        3. the replicas of a node, each with its share of the load, are packed on its ranks.

    DeepSeek-AI 2025 (EPLB). Groups of experts stay on one node (for node-limited routing) when nodes divide their
    number ("hierarchical"); otherwise all is one group on one node ("global"). Ties go to the lowest number, and
    loads are float32, so that everybody finds the same placement.

    Args:
        load: of each expert, in any unit; not negative.
        ranks: over which slots are spread evenly.
        slots: physical experts on all ranks; None = one for each expert.
        nodes: machines that hold equal numbers of ranks.
        groups: equal groups of consecutive experts.

    Raises:
        ValueError: sizes that do not divide, fewer slots than experts, or a load that is negative or not finite.
    """
    weights = _checked(load)
    slots = len(weights) if slots is None else slots
    nodes, groups = (nodes, groups) if groups % nodes == 0 else (1, 1)
    _check_sizes(len(weights), ranks, slots, nodes, groups)
    per_group, groups_per_node = len(weights) // groups, groups // nodes
    held: list[int] = []
    for node in pack(weights.reshape(groups, per_group).sum(1), nodes):
        assert len(node) == groups_per_node
        experts = [group * per_group + place for group in node for place in range(per_group)]
        copies = replicate(weights[experts], slots // nodes)
        share = (weights[experts] / np.bincount(copies).astype(np.float32))[copies]
        packs = pack(share, ranks // nodes)
        held += [experts[copies[item]] for items in packs for item in items]
    return Placement(tuple(held), len(weights), ranks)


def pack(weights: Sequence[float] | np.ndarray, packs: int) -> list[list[int]]:
    """Items in packs of equal number, each in turn, heaviest first, to the lightest pack that has room.

    Returns: the items of each pack, in the order of their arrival.
    """
    weights = np.asarray(weights, dtype=np.float32)
    room = len(weights) // packs
    if room == 1:
        return [[item] for item in range(packs)]
    filled: list[list[int]] = [[] for _ in range(packs)]
    total = np.zeros(packs, dtype=np.float32)
    for item in np.argsort(-weights, kind="stable").tolist():
        lightest = min((p for p in range(packs) if len(filled[p]) < room), key=lambda p: (total[p], p))
        filled[lightest].append(item)
        total[lightest] += weights[item]
    return filled


def replicate(weights: Sequence[float] | np.ndarray, slots: int) -> list[int]:
    """The item in each slot: every item once, then again and again the one with the most weight per replica."""
    weights = np.asarray(weights, dtype=np.float32)
    held, count = list(range(len(weights))), np.ones(len(weights), dtype=np.float32)
    for _ in range(slots - len(weights)):
        heaviest = int(np.argmax(weights / count))
        held.append(heaviest)
        count[heaviest] += 1
    return held


def _checked(load: Sequence[float]) -> np.ndarray:
    weights = np.asarray(load, dtype=np.float32)
    if weights.ndim != 1 or not len(weights):
        raise ValueError(f"a load is one number for each expert of a layer, got an array of {list(weights.shape)}")
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError("a load must be finite and not negative; pass counts of tokens or shares of them")
    return weights


def _check_sizes(experts: int, ranks: int, slots: int, nodes: int, groups: int) -> None:
    if min(ranks, nodes, groups) < 1:
        raise ValueError(f"ranks={ranks}, nodes={nodes} and groups={groups} must be at least 1")
    if slots < experts:
        raise ValueError(f"{slots} slots cannot hold {experts} experts; pass at least {experts}")
    for what, whole, part, name in (
        ("experts", experts, groups, "groups"),
        ("ranks", ranks, nodes, "nodes"),
        ("slots", slots, ranks, "ranks"),
    ):
        if whole % part:
            near = whole // part * part + part
            raise ValueError(f"{whole} {what} cannot be shared evenly by {part} {name}; {near} could")
