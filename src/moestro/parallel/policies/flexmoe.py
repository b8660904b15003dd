"""FlexMoE: replicas grow, shrink and migrate, one at a time, while a cost model says that it pays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from moestro.parallel.costs import holders
from moestro.parallel.loads import Load, load_table
from moestro.parallel.placement import Placement
from moestro.parallel.policies.base import Cluster

_GAIN = 1 - 1e-12  # less than that is rounding


def flexmoe(history: Load, cluster: Cluster, current: Placement | None = None, threshold: float = 1.1) -> Placement:
    """The current placement after those changes that make a step cheaper (Nie et al. 2023).

        while max_g load_g / mean_g load_g > threshold, and it pays:
            expand  the expert with most tokens per replica
            shrink  the replicated one with fewest, in the slot whose exchange costs least
        then exchange slots of two ranks while that pays (migrate)

    What pays is decided by `LayerCost.seconds`, so that the result never costs more than the current placement. The
    paper migrates to bring replicas of one expert together; here any exchange that pays is one.

    Args:
        history: tokens of each step over all ranks; shares would weigh nothing beside an expert's gradient.
        cluster: with what a step costs.
        current: None = `Placement.in_turn`.
        threshold: largest load of a rank over the mean that is left alone.

    Raises:
        ValueError: a threshold below 1, or sizes that do not fit.
    """
    if threshold < 1:
        raise ValueError(f"threshold={threshold} must be at least 1")
    load = load_table(history).mean(0)
    placement = current or Placement.in_turn(len(load), cluster.ranks, cluster.slots)
    if not uneven(placement, load, threshold):
        return placement
    for better in changes(placement, load, cluster, threshold):
        placement = better
    return placement


def changes(placement: Placement, load: np.ndarray, cluster: Cluster, threshold: float) -> Iterator[Placement]:
    """The placement after each change in turn, every one cheaper than the one before."""
    while uneven(placement, load, threshold) and (better := _expanded(placement, load, cluster)) is not None:
        placement = better
        yield placement
    while (better := _migrated(placement, load, cluster)) is not None:
        placement = better
        yield placement


def uneven(placement: Placement, load: np.ndarray, threshold: float) -> bool:
    """Whether the busiest rank has more than `threshold` times the mean to do."""
    return placement.balancedness(load.tolist()) * threshold < 1


def _expanded(placement: Placement, load: np.ndarray, cluster: Cluster) -> Placement | None:
    """One replica more of the busiest expert in place of one of the least busy; None if that does not pay."""
    replicas = np.array(placement.num_replicas)
    per_replica = load / replicas
    busiest = int(per_replica.argmax())
    spare = np.where(replicas > 1, per_replica, np.inf)
    idlest = int(spare.argmin())
    if not np.isfinite(spare[idlest]) or idlest == busiest:
        return None
    tried = [_with(placement, {slot: busiest}) for slot in placement.slots_of(idlest)]
    costs = [cluster.cost.seconds(each, load.tolist(), cluster.nodes) for each in tried]
    now = cluster.cost.seconds(placement, load.tolist(), cluster.nodes)
    return tried[int(np.argmin(costs))] if min(costs) < now * _GAIN else None


def _migrated(placement: Placement, load: np.ndarray, cluster: Cluster) -> Placement | None:
    """The exchange of two slots that saves most, of those on the busiest rank or with replicas; None: none does."""
    held, per_rank, where = placement.expert_of_slot, placement.slots_per_rank, holders(placement)
    work = np.array(placement.load_per_rank(load.tolist()))
    busiest, now = int(work.argmax()), cluster.cost.seconds(placement, load.tolist(), cluster.nodes)
    best, pair = (1 - _GAIN) * now, None
    for slot, expert in enumerate(held):
        if slot // per_rank != busiest and len(where[expert]) == 1:
            continue
        for other_slot, other in enumerate(held):
            if other_slot // per_rank == slot // per_rank or other == expert:
                continue
            saved = _saved(placement, work, where, load, cluster, (slot, other_slot))
            if saved > best:
                best, pair = saved, (slot, other_slot)
    return None if pair is None else _with(placement, {pair[0]: held[pair[1]], pair[1]: held[pair[0]]})


def _saved(
    placement: Placement,
    work: np.ndarray,
    where: Sequence[set[int]],
    load: np.ndarray,
    cluster: Cluster,
    slots: tuple[int, int],
) -> float:
    """Seconds that the exchange of two slots saves: `LayerCost.seconds`, but for what stays as it is."""
    cost, per_rank, per_node = cluster.cost, placement.slots_per_rank, placement.ranks // cluster.nodes
    one, other = (placement.expert_of_slot[slot] for slot in slots)
    here, there = (slot // per_rank for slot in slots)
    replicas = (placement.expert_of_slot.count(one), placement.expert_of_slot.count(other))
    moved = load[one] / replicas[0] - load[other] / replicas[1]
    after = work.copy()
    after[[here, there]] += (-moved, moved)
    saved = cost.seconds_per_row(placement.ranks, cluster.nodes) * float(work.max() - after.max())
    for expert, source, target in ((one, here, there), (other, there, here)):
        if len(placement.slots_of(expert)) == 1:
            continue
        stays = list(placement.experts_of(source)).count(expert) > 1
        ranks = (where[expert] if stays else where[expert] - {source}) | {target}
        saved += cost.sync_seconds(where[expert], per_node) - cost.sync_seconds(ranks, per_node)
    return saved


def _with(placement: Placement, changed: dict[int, int]) -> Placement:
    held = list(placement.expert_of_slot)
    for slot, expert in changed.items():
        held[slot] = expert
    return Placement(tuple(held), placement.num_experts, placement.ranks)
