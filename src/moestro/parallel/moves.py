"""From one placement to another: which rank sends which expert to whom."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from moestro.parallel.placement import Placement


@dataclass(frozen=True)
class Move:
    """One slot gets what another held before; both are numbered over all ranks."""

    source: int
    target: int


def plan_moves(before: Placement, after: Placement, ranks_per_node: int | None = None) -> list[Move]:
    """The moves that turn one placement into the other, in the order of their targets; kept slots have none.

    A rank that has the expert already copies it; else it comes from a rank of the same node where there is one,
    and of several from the one that has sent least so far.

    Raises:
        ValueError: placements of other experts, ranks or numbers of slots.
    """
    for name in ("num_experts", "ranks", "slots_per_rank"):
        ours, theirs = getattr(before, name), getattr(after, name)
        if ours != theirs:
            raise ValueError(
                f"the placements differ in {name}: {ours} and {theirs}; experts move between equals only"
            )
    per_rank, per_node = before.slots_per_rank, ranks_per_node or before.ranks
    sent: Counter[int] = Counter()
    moves = []
    for target, expert in enumerate(after.expert_of_slot):
        if before.expert_of_slot[target] == expert:
            continue
        rank = target // per_rank

        def distance(slot: int, rank: int = rank) -> tuple[int, int, int]:
            there = slot // per_rank
            far = 0 if there == rank else 1 if there // per_node == rank // per_node else 2
            return far, sent[there], slot

        source = min(before.slots_of(expert), key=distance)
        sent[source // per_rank] += source // per_rank != rank
        moves.append(Move(source, target))
    return moves
