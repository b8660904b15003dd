"""Which rank holds which expert."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """A table from physical slots to logical experts.

    Every rank holds the same number of slots, and the slots are numbered rank by rank. An expert in several slots
    has replicas; together they are one expert.

    Attributes:
        expert_of_slot: the logical expert that each slot holds.
        num_experts: logical experts; each is held by at least one slot.
        ranks: ranks over which the slots are spread.

    Raises:
        ValueError: slots that ranks cannot share evenly, an expert that does not exist or one without a slot.
    """

    expert_of_slot: tuple[int, ...]
    num_experts: int
    ranks: int

    def __post_init__(self) -> None:
        slots, held = len(self.expert_of_slot), set(self.expert_of_slot)
        if self.ranks < 1 or self.num_experts < 1:
            raise ValueError(f"a placement needs experts and ranks, got {self.num_experts} and {self.ranks}")
        if slots % self.ranks:
            raise ValueError(
                f"{slots} slots cannot be shared evenly by {self.ranks} ranks; "
                f"use {slots // self.ranks * self.ranks} or {-(-slots // self.ranks) * self.ranks} slots"
            )
        if not held <= set(range(self.num_experts)):
            wrong = sorted(held - set(range(self.num_experts)))
            raise ValueError(f"slots hold experts {wrong}, but experts are numbered 0 to {self.num_experts - 1}")
        if len(held) < self.num_experts:
            missing = sorted(set(range(self.num_experts)) - held)
            raise ValueError(f"experts {missing} have no slot; give every expert at least one")

    @classmethod
    def contiguous(cls, num_experts: int, ranks: int) -> Placement:
        """Experts in order, as many on each rank, without replicas.

        Raises:
            ValueError: experts that ranks cannot share evenly.
        """
        if ranks < 1 or num_experts % ranks:
            divisors = [n for n in range(1, num_experts + 1) if num_experts % n == 0]
            raise ValueError(
                f"{num_experts} experts cannot be shared evenly by {ranks} ranks without replicas; spread them "
                f"over {', '.join(map(str, divisors))} ranks, or pass a placement with replicas"
            )
        return cls(tuple(range(num_experts)), num_experts, ranks)

    @classmethod
    def in_turn(cls, num_experts: int, ranks: int, slots: int | None = None) -> Placement:
        """Experts in order, then again from the first until all slots are full.

        Raises:
            ValueError: fewer slots than experts, or slots that ranks cannot share evenly.
        """
        slots = num_experts if slots is None else slots
        if slots == num_experts:
            return cls.contiguous(num_experts, ranks)
        return cls(tuple(slot % num_experts for slot in range(slots)), num_experts, ranks)

    @property
    def slots_per_rank(self) -> int:
        """Slots that one rank holds."""
        return len(self.expert_of_slot) // self.ranks

    def experts_of(self, rank: int) -> Sequence[int]:
        """The logical expert in each slot of a rank."""
        first = rank * self.slots_per_rank
        return self.expert_of_slot[first : first + self.slots_per_rank]

    def slots_of(self, expert: int) -> Sequence[int]:
        """The slots that hold an expert."""
        return [slot for slot, held in enumerate(self.expert_of_slot) if held == expert]

    def load_per_rank(self, load: Sequence[float]) -> list[float]:
        """The work of each rank when experts have this load and replicas share theirs evenly."""
        if len(load) != self.num_experts:
            raise ValueError(f"a load of {len(load)} experts does not fit a placement of {self.num_experts}")
        share = [float(each) / count for each, count in zip(load, self.num_replicas, strict=True)]
        return [sum(share[expert] for expert in self.experts_of(rank)) for rank in range(self.ranks)]

    def balancedness(self, load: Sequence[float]) -> float:
        """Mean over the largest load of a rank: 1 = even, 1 / ranks = all on one; 1 where there is no load."""
        per_rank = self.load_per_rank(load)
        return sum(per_rank) / len(per_rank) / max(per_rank) if max(per_rank) else 1.0

    @property
    def num_replicas(self) -> list[int]:
        """How many slots hold each expert."""
        count = Counter(self.expert_of_slot)
        return [count[expert] for expert in range(self.num_experts)]
