"""Which tokens compete with each other for an expert's slots, and how many slots there are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.routing import Context
from moestro.routing.context import group_by_sequence


class Group(ABC):
    """Splits the valid tokens of a call into groups that compete.

    Attributes:
        batch_independent: whether groups hold tokens of one sequence only.
    """

    batch_independent: bool

    @abstractmethod
    def __call__(self, context: Context, num_tokens: int, device: torch.device) -> list[Tensor]:
        """Indices of each group's tokens, in token order."""


class WholeCall(Group):
    """All tokens of the call compete."""

    batch_independent = False

    def __call__(self, context: Context, num_tokens: int, device: torch.device) -> list[Tensor]:
        if context.valid is None:
            return [torch.arange(num_tokens, device=device)]
        return [context.valid.nonzero()[:, 0]]


class EachSequence(Group):
    """Tokens compete with those of their own sequence."""

    batch_independent = True

    def __call__(self, context: Context, num_tokens: int, device: torch.device) -> list[Tensor]:
        token, present, _ = group_by_sequence(context.sequence, context.valid, num_tokens, device)
        return [places[there] for places, there in zip(token, present, strict=True)]


class Slots(ABC):
    """How many tokens of a group an expert picks.

    Attributes:
        experts_per_token: experts that serve a token on average, at most.
    """

    experts_per_token: float

    @abstractmethod
    def __call__(self, num_tokens: int, num_experts: int) -> int:
        """Slots of one expert for a group of so many tokens, at most that many."""


@dataclass(frozen=True)
class Share(Slots):
    """`T c / E` slots, rounded down, but at least one (Zhou et al. 2022, eq. 1).

    Attributes:
        experts_per_token: c, above 0.
    """

    experts_per_token: float

    def __call__(self, num_tokens: int, num_experts: int) -> int:
        slots = int(num_tokens * self.experts_per_token / num_experts)
        return min(max(slots, 1), num_tokens)


@dataclass(frozen=True)
class CappedShare(Slots):
    """As `Share`, but never so many that tokens would need more than `bound` experts each: `E slots <= T bound`.

    Raises:
        ValueError: more experts per token on average than at most.
    """

    experts_per_token: float
    bound: int

    def __post_init__(self) -> None:
        if self.experts_per_token > self.bound:
            raise ValueError(
                f"no assignment gives a token {self.experts_per_token} experts on average and at most "
                f"{self.bound}; lower capacity_factor or raise max_experts"
            )

    def __call__(self, num_tokens: int, num_experts: int) -> int:
        return min(Share(self.experts_per_token)(num_tokens, num_experts), num_tokens * self.bound // num_experts)


@dataclass(frozen=True)
class Fixed(Slots):
    """The same number of slots whatever the group; `experts_per_token` is the bound, all experts.

    Raises:
        ValueError: fewer than one slot.
    """

    slots: int
    experts_per_token: float

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise ValueError(f"{self.slots} slots keep nothing; pass at least 1")

    def __call__(self, num_tokens: int, num_experts: int) -> int:
        return min(self.slots, num_tokens)
