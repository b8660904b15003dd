"""Capacity policies: how many tokens an expert takes, and who is dropped."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from moestro.routing import Context, Selection
from moestro.routing.sparse import offsets_from

Slots = Callable[[int, int], int]
MANY = 1 << 20  # tokens of which some must find a place


def above_zero(factor: float) -> float:
    """The capacity factor itself, or ValueError if no expert could take a token."""
    if not factor > 0:
        raise ValueError(f"a capacity factor of {factor} keeps nothing; it must be above 0, 1 being an even load")
    return factor


def switch_slots(num_tokens: int, num_experts: int, factor: float, minimum: int = 4) -> int:
    """`max(min(T, int(factor * T / E)), minimum)`: Fedus et al. 2021, eq. 3, with the released code's clamps."""
    return max(min(num_tokens, int(above_zero(factor) * num_tokens / num_experts)), minimum)


def gshard_slots(num_tokens: int, num_experts: int, factor: float = 2.0) -> int:
    """`factor * ceil(T / E)`, rounded down: about 2 T / E for two choices, Lepikhin et al. 2020."""
    return int(above_zero(factor) * math.ceil(num_tokens / num_experts))


def slots_of_choices(num_tokens: int, num_experts: int, factor: float, k: int, minimum: int = 1) -> int:
    """`max(ceil(factor * k * T / E), minimum)`: slots for k choices per token, Rajbhandari et al. 2022."""
    return max(math.ceil(above_zero(factor) * k * num_tokens / num_experts), minimum)


class Capacity(nn.Module, ABC):
    """A policy that takes choices out of a Selection; combine weights stay as they are.

    Attributes:
        batch_independent: whether a token's fate is its own, whoever else is in the batch.
    """

    batch_independent: bool

    @abstractmethod
    def forward(self, chosen: Selection, weight: Tensor, num_experts: int, context: Context) -> Selection:
        """The choices that remain; `weight [tokens, k]` are their combine weights."""

    @abstractmethod
    def causal(self, k: int) -> bool:
        """Whether later tokens cannot take the place of earlier ones, with k choices per token."""

    def causal_evaluation(self, k: int) -> bool:
        """The same for evaluation."""
        return self.causal(k)


class Dropless(Capacity):
    """Every expert takes all that come."""

    batch_independent = True

    def forward(self, chosen: Selection, weight: Tensor, num_experts: int, context: Context) -> Selection:
        return chosen

    def causal(self, k: int) -> bool:
        return True


class DropByPosition(Capacity):
    """Experts take the first tokens that come; all first choices go before any second choice.

    A dropped choice contributes nothing; the residual connection around the layer carries the token.
    With one choice per token this is causal (later tokens cannot displace earlier ones); with several it is
    not, because a later token's first choice goes before an earlier token's second one.

    Args:
        train: slots of an expert in training, as a function of tokens and experts.
        evaluate: the same in evaluation; default: as in training.

    Raises:
        ValueError: slots that keep nothing, whatever the number of tokens or of those that came.
    """

    batch_independent = False

    def __init__(self, train: Slots, evaluate: Slots | None = None) -> None:
        super().__init__()
        self.train_slots, self.evaluate_slots = train, evaluate or train
        for slots in (self.train_slots, self.evaluate_slots):
            slots_of_each(slots, num_tokens=MANY, num_experts=1)

    def forward(self, chosen: Selection, weight: Tensor, num_experts: int, context: Context) -> Selection:
        return chosen.restricted(place_in_line(chosen, num_experts) < self.slots(len(weight), num_experts, context))

    def slots(self, num_tokens: int, num_experts: int, context: Context) -> int:
        """Slots of each expert for these tokens."""
        slots = self.train_slots if self.training else self.evaluate_slots
        return slots_of_each(slots, context.num_valid(num_tokens), num_experts)

    def causal(self, k: int) -> bool:
        return k == 1

    def extra_repr(self) -> str:
        return f"train={_describe(self.train_slots)}, evaluate={_describe(self.evaluate_slots)}"


class InTraining(Capacity):
    """A capacity that binds in training only; evaluation drops nothing and depends on nobody else.

    Args:
        capacity: the policy inside.
    """

    batch_independent = True

    def __init__(self, capacity: Capacity) -> None:
        super().__init__()
        self.capacity = capacity

    def forward(self, chosen: Selection, weight: Tensor, num_experts: int, context: Context) -> Selection:
        if not self.training:
            return chosen
        kept: Selection = self.capacity(chosen, weight, num_experts, context)
        return kept

    def causal(self, k: int) -> bool:
        return self.capacity.causal(k)

    def causal_evaluation(self, k: int) -> bool:
        return True


def slots_of_each(slots: Slots, num_tokens: int, num_experts: int) -> int:
    """Slots of each expert, or ValueError if there are tokens and no slot."""
    count = slots(num_tokens, num_experts)
    if count < 1 and num_tokens > 0:
        raise ValueError(
            f"{_describe(slots)} leaves {count} slots per expert for {num_tokens} tokens and {num_experts} experts "
            "and keeps nothing; raise the capacity factor or pass more tokens at a time"
        )
    return count


def place_in_line(chosen: Selection, num_experts: int) -> Tensor:
    """Place of each choice in its expert's queue: all first choices in token order, then all second ones...

    Choices that do not count take no place. Shapes: -> `[tokens, k]` int64.
    """
    index = chosen.index if chosen.keep is None else chosen.index.masked_fill(~chosen.keep, num_experts)
    expert = index.t().flatten()  # [k * tokens], choice-major
    order = expert.argsort(stable=True)
    start = offsets_from(expert, num_experts)
    place = torch.empty_like(expert)
    place[order] = torch.arange(len(order), device=order.device) - start[expert[order]]
    return place.view(index.shape[1], index.shape[0]).t()


def _describe(slots: Slots) -> str:
    if isinstance(slots, partial):
        arguments = ", ".join(f"{name}={value}" for name, value in slots.keywords.items())
        return f"{slots.func.__name__}({arguments})"
    return getattr(slots, "__name__", repr(slots))
