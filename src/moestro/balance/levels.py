"""Balance at the level of groups of experts: devices, nodes, and what is sent to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moestro.balance.counts import count, counted_choices, facts
from moestro.routing import Decision


@dataclass(frozen=True)
class GroupBalance:
    """Load times probability over groups of consecutive experts.

        sum_g f'_g P'_g,   f'_g = mean over the group of f_e = E / (k T) * count_e,   P'_g = sum of P_e
        Dai et al. 2024, eqs. 12-14 and 15-17

    1 when even. One expert per group is the `megatron` loss; a single group gives 1, without a gradient.

    Attributes:
        num_groups: groups, e.g. devices; must divide the number of experts.
    """

    num_groups: int

    def __call__(self, decision: Decision) -> Tensor:
        """Raises ValueError for a decision without probabilities or choices."""
        probs, choice, valid = facts(decision)
        counted = counted_choices(decision, choice)
        per_group = group_size(probs.shape[1], self.num_groups)
        load = count(choice // per_group, counted, self.num_groups, probs.dtype)
        f = load * self.num_groups / counted.sum().clamp(min=1)
        return (f * _group_means(probs, valid, self.num_groups)).sum()


@dataclass(frozen=True)
class CommunicationBalance:
    """Keeps the tokens sent to each group even; a token counts once for a group, however many experts it uses.

        sum_g f''_g P''_g,   f''_g = D / (M T) * tokens sent to group g,   P''_g = sum of P_e
        DeepSeek-AI 2024 (V2), eqs. 29-31; D groups, each token sent to at most M

    1 when even and every token uses M groups.

    Attributes:
        num_groups: groups of consecutive experts, D.
        groups_kept: groups that a token may use, M.
    """

    num_groups: int
    groups_kept: int

    def __call__(self, decision: Decision) -> Tensor:
        """Raises ValueError for a decision without probabilities or choices."""
        probs, choice, valid = facts(decision)
        group = choice // group_size(probs.shape[1], self.num_groups)
        touched = torch.zeros(len(probs), self.num_groups, dtype=probs.dtype, device=probs.device)
        counted = counted_choices(decision, choice).to(probs.dtype)
        touched = touched.scatter_reduce(1, group, counted, "amax")
        f = touched.sum(0) * self.num_groups / (self.groups_kept * valid.sum().clamp(min=1))
        return (f * _group_means(probs, valid, self.num_groups)).sum()


@dataclass(frozen=True)
class GlobalBatchBalance:
    """Load times probability whose counts are those of all ranks; probabilities are this rank's.

        E * sum_e f_e P_e,   f_e = count_e / all counts, summed over the group        Qiu et al. 2025, eq. 3

    Averaged over ranks of equal size this is the loss of the whole batch, so experts may specialise in sequences.
    One process alone gives the `megatron` loss. Counts are of one call, not of all micro-batches of a step.

    Attributes:
        group: process group; None = all ranks, if torch.distributed runs.
    """

    group: dist.ProcessGroup | None = None

    def __call__(self, decision: Decision) -> Tensor:
        """Raises ValueError for a decision without probabilities or choices."""
        probs, choice, valid = facts(decision)
        load = count(choice, counted_choices(decision, choice), probs.shape[1], probs.dtype)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(load, group=self.group)
        mean = (probs * valid.unsqueeze(1)).sum(0) / valid.sum().clamp(min=1)
        return probs.shape[1] * (load / load.sum().clamp(min=1) * mean).sum()


def group_size(num_experts: int, num_groups: int) -> int:
    """Experts per group, or ValueError if groups cannot be equal."""
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"num_groups={num_groups} does not divide {num_experts} experts; choose a divisor")
    return num_experts // num_groups


def _group_means(probs: Tensor, valid: Tensor, num_groups: int) -> Tensor:
    """Mean probability of each group, `[groups]`."""
    mean = (probs * valid.unsqueeze(1)).sum(0) / valid.sum().clamp(min=1)
    return mean.view(num_groups, -1).sum(1)
