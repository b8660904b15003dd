"""Policies: from what experts had to do lately to who shall hold them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from moestro.parallel.eplb import eplb
from moestro.parallel.loads import Load, load_shares, load_table
from moestro.parallel.placement import Placement


@dataclass(frozen=True)
class Cluster:
    """What experts are spread over.

    Attributes:
        ranks: processes that hold experts.
        slots: physical experts on all ranks; None = one for each expert.
        nodes: machines with equal numbers of ranks.
        groups: equal groups of consecutive experts that tokens choose among (node-limited routing).
    """

    ranks: int
    slots: int | None = None
    nodes: int = 1
    groups: int = 1


Policy = Callable[[Load, Cluster], Placement]


def contiguous(history: Load, cluster: Cluster) -> Placement:
    """Experts in order, whatever their load."""
    return Placement.contiguous(load_table(history).shape[1], cluster.ranks)


def hierarchical(history: Load, cluster: Cluster) -> Placement:
    """`eplb` with the cluster's groups and nodes: DeepSeek's choice for prefill and training."""
    load = load_table(history).mean(0)
    return eplb(load, ranks=cluster.ranks, slots=cluster.slots, nodes=cluster.nodes, groups=cluster.groups)


def everywhere(history: Load, cluster: Cluster) -> Placement:
    """`eplb` without regard to nodes: DeepSeek's choice for decoding on many ranks."""
    return eplb(load_table(history).mean(0), ranks=cluster.ranks, slots=cluster.slots)


def greedy(history: Load, cluster: Cluster, current: Placement | None = None) -> Placement:
    """Experts by falling mean load, each to the least loaded rank that has room; no replicas.

    Huang et al. 2023, section 5.1; Zhai et al. 2023 (SmartMoE) break ties for the rank that has the expert.

    Args:
        current: keeps experts where they are among equal choices; None = the lowest rank.
    """
    shares = load_shares(history)
    mean = shares.mean(0)
    owner = {} if current is None else _owners(current)

    def score(expert: int, rank: int, held: Sequence[int]) -> tuple[float, ...]:
        return float(sum(mean[each] for each in held)), rank != owner.get(expert, rank), rank

    return _placed(mean, cluster.ranks, score)


def anti_correlation(history: Load, cluster: Cluster, weight: float = 0.5) -> Placement:
    """As `greedy`, but experts that are busy at the same time keep apart; no replicas.

        score(e, g) = sum over m on g of mean load_m + weight * sum over m on g of corr(load_e, load_m)
        Huang et al. 2023, section 5.2

    A load that never changes correlates with nothing.
    """
    shares = load_shares(history)
    mean, together = shares.mean(0), _correlation(shares)

    def score(expert: int, rank: int, held: Sequence[int]) -> tuple[float, ...]:
        load = float(sum(mean[each] for each in held))
        return load + weight * float(sum(together[expert, each] for each in held)), rank

    return _placed(mean, cluster.ranks, score)


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


POLICIES: dict[str, Policy] = {
    "contiguous": contiguous,
    "greedy": greedy,
    "anti-correlation": anti_correlation,
    "eplb": hierarchical,
    "eplb-global": everywhere,
    "refined": refined,
}
REPLICATING = {"eplb", "eplb-global", "refined"}  # the others hold every expert once


def _placed(
    mean: np.ndarray, ranks: int, score: Callable[[int, int, Sequence[int]], tuple[float, ...]]
) -> Placement:
    """Experts by falling load, each to the rank with room whose score is least."""
    if ranks < 1 or len(mean) % ranks:
        Placement.contiguous(len(mean), ranks)  # says which ranks could
    room = len(mean) // ranks
    held: list[list[int]] = [[] for _ in range(ranks)]
    for expert in np.argsort(-mean, kind="stable").tolist():
        open_ranks = [rank for rank in range(ranks) if len(held[rank]) < room]
        held[min(open_ranks, key=lambda rank: score(expert, rank, held[rank]))].append(expert)
    return Placement(tuple(expert for rank in held for expert in rank), len(mean), ranks)


def _owners(placement: Placement) -> dict[int, int]:
    experts = range(placement.num_experts)
    return {expert: placement.slots_of(expert)[0] // placement.slots_per_rank for expert in experts}


def _correlation(shares: np.ndarray) -> np.ndarray:
    """Pearson's correlation of experts over steps, `[experts, experts]`; 0 for those that never change."""
    centred = shares - shares.mean(0)
    size = np.sqrt((centred**2).sum(0))
    size = np.where(size > 1e-12, size, np.inf)
    return (centred.T @ centred) / np.outer(size, size)
