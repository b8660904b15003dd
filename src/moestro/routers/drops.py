"""More capacity policies: by priority, by affinity within groups, with slots of each expert's own, with retries."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moestro.routers.capacities import Capacity, DropByPosition, above_zero, place_in_line
from moestro.routers.selects import Select
from moestro.routing import Context, Selection
from moestro.routing.sparse import offsets_from


def slots_in_fours(num_tokens: int, num_experts: int, factor: float, k: int) -> int:
    """`ceil(factor * k * T / E)` rounded up to a multiple of four: Riquelme et al. 2021, released code."""
    return 4 * math.ceil(math.ceil(above_zero(factor) * k * num_tokens / num_experts) / 4)


def share_of_tokens(num_tokens: int, num_experts: int, share: float) -> int:
    """`ceil(share * T)`, whatever the number of experts: evaluation of Artetxe et al. 2021."""
    return math.ceil(above_zero(share) * num_tokens)


def tutel_slots(num_tokens: int, num_experts: int, factor: float, select: Select) -> int:
    """`k * int(factor * ceil(T / E))` for the k that the selection has now: Hwang et al. 2023."""
    return select.k * int(above_zero(factor) * math.ceil(num_tokens / num_experts))


def locmoe_slots(num_tokens: int, num_experts: int, width: int, delta: float) -> int:
    """The even load over `erfc(sqrt(delta^2 d / (2 - delta^2)))`, at most T: Li et al. 2024, theorem 1."""
    rare = math.erfc(math.sqrt(delta**2 * width / (2 - delta**2)))
    return min(num_tokens, math.ceil(num_tokens / num_experts / max(rare, 1e-300)))


def slots_by_price(num_tokens: int, factor: float, k: int, dear: int, free: int, tau: float) -> list[int]:
    """Slots of experts that cost, and 1/tau as many of experts that are free; in all `factor * k * T`.

    C = factor k T tau / (tau N + N_free) and factor k T / (tau N + N_free): Jin et al. 2024, eq. 8, for k choices.
    """
    unit = above_zero(factor) * k * num_tokens / (tau * dear + free)
    return [math.ceil(unit * tau)] * dear + [math.ceil(unit)] * free


class DropByPriority(DropByPosition):
    """Batch-prioritised routing: tokens queue by their largest weight, not by their position.

        order tokens by falling max_e a[t, e];   all first choices in that order, then all second ones...
        Riquelme et al. 2021, section 4.1

    Whoever comes later with a larger weight takes the place: never causal.
    """

    def forward(self, chosen: Selection, weight: Tensor, num_experts: int, context: Context) -> Selection:
        order = weight.detach().amax(1).argsort(descending=True, stable=True)
        keep = None if chosen.keep is None else chosen.keep[order]
        in_order = super().forward(Selection(chosen.index[order], keep), weight, num_experts, context)
        assert in_order.keep is not None
        return chosen.restricted(torch.empty_like(in_order.keep).index_copy(0, order, in_order.keep))

    def causal(self, k: int) -> bool:
        return False


class DropByPositionPerExpert(Capacity):
    """Experts of different kinds have different numbers of slots; earlier tokens come first.

    Args:
        slots: number of valid tokens -> slots of each expert.
    """

    batch_independent = False

    def __init__(self, slots: Callable[[int], Sequence[int]]) -> None:
        super().__init__()
        self.slots = slots
        slots(1)  # refuses a capacity factor that keeps nothing

    def forward(self, chosen: Selection, weight: Tensor, num_experts: int, context: Context) -> Selection:
        slots = torch.tensor(self.slots(context.num_valid(len(weight))), device=weight.device)
        return chosen.restricted(place_in_line(chosen, num_experts) < slots[chosen.index])

    def causal(self, k: int) -> bool:
        return k == 1


class DropLeastAffine(Capacity):
    """Each group of experts has a budget; where it is exceeded, the choices of the lowest weights go.

        budget = ceil(factor * choices / groups)        DeepSeek-AI 2024 (V2), section 2.2.4

    All choices of a random share of the sequences are protected: they stay even beyond the budget.

    Args:
        num_groups: groups of consecutive experts, e.g. devices.
        factor: budget in units of the even load.
        protected: share of the sequences that never lose a choice.

    Raises:
        ValueError: a factor that is not above 0, or a share outside 0 to 1.
    """

    batch_independent = False

    def __init__(self, num_groups: int, factor: float = 1.0, protected: float = 0.1) -> None:
        super().__init__()
        if factor <= 0 or not 0 <= protected <= 1:
            raise ValueError(f"capacity_factor={factor} must be above 0 and protected={protected} between 0 and 1")
        self.num_groups, self.factor, self.protected = num_groups, factor, protected

    def forward(self, chosen: Selection, weight: Tensor, num_experts: int, context: Context) -> Selection:
        counts = torch.ones_like(chosen.index, dtype=torch.bool) if chosen.keep is None else chosen.keep
        budget = math.ceil(self.factor * int(counts.sum()) / self.num_groups)
        safe = self._protected(len(weight), context, weight.device).unsqueeze(1).expand_as(counts)
        affinity = weight.detach().masked_fill(safe, torch.inf).flatten()
        group = chosen.index // (num_experts // self.num_groups)
        group = group.masked_fill(~counts, self.num_groups).flatten()
        by_affinity = affinity.argsort(descending=True, stable=True)
        order = by_affinity[group[by_affinity].argsort(stable=True)]  # by group, then by falling affinity
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        place = place - offsets_from(group, self.num_groups)[group]
        return chosen.restricted((place.view_as(counts) < budget) | safe)

    def causal(self, k: int) -> bool:
        return False

    def _protected(self, num_tokens: int, context: Context, device: torch.device) -> Tensor:
        """Tokens of the sequences drawn to be safe, `[tokens]` bool."""
        if context.sequence is None:
            return (torch.rand(1, device=device) < self.protected).expand(num_tokens)
        _, sequence = torch.unique(context.sequence, return_inverse=True)
        return (torch.rand(max(num_tokens, 1), device=device) < self.protected)[sequence]


class RetryByPosition(DropByPosition):
    """No token left behind: a token that overflows tries its next choice, and ends with at most one expert.

        pass r = 1..k: tokens still without an expert queue for their r-th choice, in token order
        Fedus et al. 2021, appendix B

    A later token of an earlier pass goes first, so this is not causal.

    Args:
        train: slots of an expert in training, as a function of tokens and experts.
        evaluate: the same in evaluation; default: as in training.
    """

    def forward(self, chosen: Selection, weight: Tensor, num_experts: int, context: Context) -> Selection:
        slots = self.slots(len(weight), num_experts, context)
        waiting = torch.ones_like(chosen.index[:, 0], dtype=torch.bool)
        used = torch.zeros(num_experts, dtype=torch.long, device=weight.device)
        accepted = []
        for choice in range(chosen.k):
            index = chosen.index[:, choice]
            tries = waiting if chosen.keep is None else waiting & chosen.keep[:, choice]
            place = place_in_line(Selection(index.unsqueeze(1), tries.unsqueeze(1)), num_experts).squeeze(1)
            fits = tries & (used[index] + place < slots)
            used = used.scatter_add(0, index, fits.long())
            waiting = waiting & ~fits
            accepted.append(fits)
        return chosen.restricted(torch.stack(accepted, 1))
