"""Balance at the level of groups of experts: devices, nodes, and what is sent to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from moestro.balance.counts import chosen_by, facts
from moestro.balance.loss import Sums, TokenLoss
from moestro.balance.losses import LoadTimesProbability
from moestro.routing import Decision


@dataclass(frozen=True)
class GroupBalance(TokenLoss):
    """Load times probability over groups of consecutive experts.

        sum_g f'_g P'_g,   f'_g = mean over the group of f_e = E / (k T) * count_e,   P'_g = sum of P_e
        Dai et al. 2024, eqs. 12-14 and 15-17

    1 when even. One expert per group is the `megatron` loss; a single group gives 1, without a gradient.

    Attributes:
        num_groups: groups, e.g. devices; must divide the number of experts.
    """

    num_groups: int

    def terms(self, decision: Decision) -> dict[str, Tensor]:
        """Raises ValueError for a decision without probabilities or choices."""
        probs, choice, counted = facts(decision)
        per_group = group_size(probs.shape[1], self.num_groups)
        chosen = chosen_by(choice // per_group, counted, self.num_groups, probs.dtype)
        return {"chosen": chosen, "choices": counted.sum(1), "probs": _by_group(probs, self.num_groups)}

    def value(self, sums: Sums) -> Tensor:
        f = sums["chosen"] * self.num_groups / sums["choices"].clamp(min=1).unsqueeze(-1)
        return (f * sums["probs"] / sums["tokens"].clamp(min=1).unsqueeze(-1)).sum(-1)


@dataclass(frozen=True)
class CommunicationBalance(TokenLoss):
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

    def terms(self, decision: Decision) -> dict[str, Tensor]:
        """Raises ValueError for a decision without probabilities or choices."""
        probs, choice, counted = facts(decision)
        group = choice // group_size(probs.shape[1], self.num_groups)
        touched = torch.zeros(len(probs), self.num_groups, dtype=probs.dtype, device=probs.device)
        touched = touched.scatter_reduce(1, group, counted.to(probs.dtype), "amax")
        return {"touched": touched, "probs": _by_group(probs, self.num_groups)}

    def value(self, sums: Sums) -> Tensor:
        tokens = sums["tokens"].clamp(min=1).unsqueeze(-1)
        f = sums["touched"] * self.num_groups / (self.groups_kept * tokens)
        return (f * sums["probs"] / tokens).sum(-1)


@dataclass(frozen=True)
class GlobalBatchBalance(LoadTimesProbability):
    """Load times probability whose counts are those of all ranks; probabilities are this rank's.

        E * sum_e f_e P_e,   f_e = count_e / all counts, summed over the group        Qiu et al. 2025, eq. 3

    Averaged over ranks of equal size this is the loss of the whole batch, so experts may specialise in sequences.
    One process alone gives the `megatron` loss. For counts over all micro-batches of a step as well, and ranks of
    any size, give the log the sums of its first pass, see `moestro.balance.RoutingLog.first_pass`.

    Attributes:
        group: process group; None = all ranks, if torch.distributed runs.
    """

    convention: Literal["megatron"] = "megatron"
    group: dist.ProcessGroup | None = None

    def __call__(self, decision: Decision) -> Tensor:
        """Raises ValueError for a decision without probabilities or choices."""
        sums = self.sums(decision)
        if dist.is_available() and dist.is_initialized():
            for name in ("chosen", "choices"):
                dist.all_reduce(sums[name], group=self.group)
        return self.value(sums)


def group_size(num_experts: int, num_groups: int) -> int:
    """Experts per group, or ValueError if groups cannot be equal."""
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"num_groups={num_groups} does not divide {num_experts} experts; choose a divisor")
    return num_experts // num_groups


def _by_group(probs: Tensor, num_groups: int) -> Tensor:
    """Probability of each group, `[tokens, groups]`."""
    return probs.unflatten(1, (num_groups, -1)).sum(-1)
