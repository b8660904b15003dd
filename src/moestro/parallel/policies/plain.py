"""Policies that look at loads only: in order, EPLB, greedy, anti-correlation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from moestro.parallel.eplb import eplb
from moestro.parallel.loads import Load, load_shares, load_table
from moestro.parallel.placement import Placement
from moestro.parallel.policies.base import Cluster


def contiguous(history: Load, cluster: Cluster, current: Placement | None = None) -> Placement:
    """Experts in order, whatever their load."""
    return Placement.contiguous(load_table(history).shape[1], cluster.ranks)


def hierarchical(history: Load, cluster: Cluster, current: Placement | None = None) -> Placement:
    """`eplb` with the cluster's groups and nodes: DeepSeek's choice for prefill and training."""
    load = load_table(history).mean(0)
    return eplb(load, ranks=cluster.ranks, slots=cluster.slots, nodes=cluster.nodes, groups=cluster.groups)


def everywhere(history: Load, cluster: Cluster, current: Placement | None = None) -> Placement:
    """`eplb` without regard to nodes: DeepSeek's choice for decoding on many ranks."""
    return eplb(load_table(history).mean(0), ranks=cluster.ranks, slots=cluster.slots)


def greedy(history: Load, cluster: Cluster, current: Placement | None = None) -> Placement:
    """Experts by falling mean load, each to the least loaded rank that has room; no replicas.

    Huang et al. 2023, section 5.1; Zhai et al. 2023 (SmartMoE) break ties for the rank that has the expert.

    Args:
        current: keeps experts where they are among equal choices; None = the lowest rank.
    """
    mean = load_shares(history).mean(0)
    owner = {} if current is None else owners(current)

    def score(expert: int, rank: int, held: Sequence[int]) -> tuple[float, ...]:
        return float(sum(mean[each] for each in held)), rank != owner.get(expert, rank), rank

    return _placement(filled(mean, cluster.ranks, _room(mean, cluster), score))


def anti_correlation(
    history: Load, cluster: Cluster, current: Placement | None = None, weight: float = 0.5
) -> Placement:
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

    return _placement(filled(mean, cluster.ranks, _room(mean, cluster), score))


def filled(
    mean: np.ndarray, ranks: int, room: int, score: Callable[[int, int, Sequence[int]], tuple[float, ...]]
) -> list[list[int]]:
    """Experts by falling load, each to the rank with room whose score is least; the experts of every rank."""
    held: list[list[int]] = [[] for _ in range(ranks)]
    for expert in np.argsort(-mean, kind="stable").tolist():
        open_ranks = [rank for rank in range(ranks) if len(held[rank]) < room]
        held[min(open_ranks, key=lambda rank: score(expert, rank, held[rank]))].append(expert)
    return held


def owners(placement: Placement) -> dict[int, int]:
    """The first rank that holds each expert."""
    experts = range(placement.num_experts)
    return {expert: placement.slots_of(expert)[0] // placement.slots_per_rank for expert in experts}


def _room(mean: np.ndarray, cluster: Cluster) -> int:
    """Experts of a rank without replicas; ValueError where ranks cannot share them evenly."""
    return Placement.contiguous(len(mean), cluster.ranks).slots_per_rank


def _placement(held: Sequence[Sequence[int]]) -> Placement:
    experts = tuple(expert for rank in held for expert in rank)
    return Placement(experts, len(experts), len(held))


def _correlation(shares: np.ndarray) -> np.ndarray:
    """Pearson's correlation of experts over steps, `[experts, experts]`; 0 for those that never change."""
    centred = shares - shares.mean(0)
    size = np.sqrt((centred**2).sum(0))
    size = np.where(size > 1e-12, size, np.inf)
    return (centred.T @ centred) / np.outer(size, size)
