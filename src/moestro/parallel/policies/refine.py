"""The best of several policies, made better by exchanges of two slots."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moestro.parallel.loads import Load, load_table
from moestro.parallel.placement import Placement
from moestro.parallel.policies.base import Cluster
from moestro.parallel.policies.plain import everywhere, greedy


def refined(history: Load, cluster: Cluster, current: Placement | None = None) -> Placement:
    """The best of `everywhere`, `greedy` and the current placement, then better by exchanges of two slots.

    So it is never worse, for the mean load, than any of them; EPLB alone is sometimes worse than experts in order.
    """
    load = load_table(history).mean(0)
    starts = [everywhere(history, cluster)]
    if cluster.slots in (None, len(load)):
        starts += [greedy(history, cluster, current), Placement.contiguous(len(load), cluster.ranks)]
    if current is not None and len(current.expert_of_slot) == len(starts[0].expert_of_slot):
        starts.insert(0, current)
    better = [exchanged(start, load) for start in starts]
    return max(better, key=lambda placement: placement.balancedness(load))


def exchanged(placement: Placement, load: Sequence[float] | np.ndarray) -> Placement:
    """A placement after exchanges of two slots, while one relieves the busiest rank and makes no other as busy."""
    share = np.asarray(load, dtype=np.float64) / placement.num_replicas
    held = np.array(placement.expert_of_slot).reshape(placement.ranks, -1)
    for _ in range(held.size * held.size):
        work = share[held].sum(1)
        busiest = int(work.argmax())
        others = [rank for rank in range(len(held)) if rank != busiest]
        moved = share[held[busiest]][:, None, None] - share[held[others]][None]  # [own, others, theirs]
        worst = np.maximum(work[busiest] - moved, work[others][None, :, None] + moved)
        own, other, theirs = np.unravel_index(worst.argmin(), worst.shape) if worst.size else (0, 0, 0)
        if not worst.size or worst[own, other, theirs] >= work[busiest] * (1 - 1e-12):
            break
        there = (others[other], theirs)
        held[busiest, own], held[there] = held[there], held[busiest, own]
    return Placement(tuple(held.flatten().tolist()), placement.num_experts, placement.ranks)
