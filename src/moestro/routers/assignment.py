"""The best assignment of tokens to experts that all take equally many: a transportation problem."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def balanced_assignment(scores: Floats) -> Ints:
    """Expert of each token so that the sum of scores is largest and loads differ by at most one.

    Successive shortest paths: every token starts at its best expert; while some expert has too many, the cheapest
    chain of moves from an overfull expert to one with room is carried out. What remains optimal step by step is
    optimal at the end. Costs `overflow * (tokens + experts^2)` steps.

    Shapes: scores `[tokens, experts]`, all finite -> `[tokens]` int64.
    """
    tokens, num_experts = scores.shape
    share, rest = divmod(tokens, num_experts)
    if not rest:
        return transport(scores, np.full(num_experts, share))
    # each expert has one slot more, which alone may hold a token without a preference instead
    spare = num_experts - rest
    forbidden = scores.min() - scores.max() - 1.0
    nobody = np.concatenate([np.full((spare, num_experts), tokens * forbidden), np.zeros((spare, num_experts))], 1)
    slots = np.concatenate([np.full(num_experts, share), np.ones(num_experts, dtype=np.int64)])
    owner = transport(np.concatenate([np.concatenate([scores, scores], 1), nobody]), slots)
    return owner[:tokens] % num_experts


def transport(scores: Floats, slots: Ints) -> Ints:
    """Expert of each token so that the sum of scores is largest and expert e has `slots[e]` tokens.

    Shapes: scores `[tokens, experts]`, all finite, slots `[experts]` that sum to tokens -> `[tokens]` int64.
    """
    num_experts = scores.shape[1]
    owner = scores.argmax(1)
    load = np.bincount(owner, minlength=num_experts)
    cost, mover = np.empty((num_experts, num_experts)), np.zeros((num_experts, num_experts), dtype=np.int64)
    stale = list(range(num_experts))
    while (load > slots).any():
        for expert in stale:
            cost[expert], mover[expert] = _cheapest_moves(scores, owner, expert)
        path = _cheapest_path(cost, load > slots, load < slots)
        for source, target in pairwise(path):
            owner[mover[source, target]] = target
        load[path[0]] -= 1
        load[path[-1]] += 1
        stale = path
    return owner


def _cheapest_moves(scores: Floats, owner: Ints, expert: int) -> tuple[Floats, Ints]:
    """What it costs at least to move one of an expert's tokens to each expert, and which token that is."""
    mine = np.flatnonzero(owner == expert)
    if not len(mine):
        return np.full(scores.shape[1], np.inf), np.zeros(scores.shape[1], dtype=np.int64)
    loss = scores[mine, expert, None] - scores[mine]
    best = loss.argmin(0)
    cost = loss[best, np.arange(scores.shape[1])]
    cost[expert] = np.inf
    return cost, mine[best]


def _cheapest_path(cost: Floats, overfull: NDArray[np.bool_], roomy: NDArray[np.bool_]) -> list[int]:
    """Experts along the cheapest chain of moves (Bellman and Ford; moves may gain, cycles never do)."""
    num_experts = len(cost)
    distance = np.where(overfull, 0.0, np.inf)
    before = np.full(num_experts, -1)
    for _ in range(num_experts):
        reach = distance[:, None] + cost
        best = reach.argmin(0)
        shorter = reach[best, np.arange(num_experts)] < distance - 1e-12
        if not shorter.any():
            break
        distance = np.where(shorter, reach[best, np.arange(num_experts)], distance)
        before = np.where(shorter, best, before)
    path = [int(np.where(roomy, distance, np.inf).argmin())]
    while before[path[0]] >= 0:
        path.insert(0, int(before[path[0]]))
    return path
