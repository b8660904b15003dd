"""Two levels of noisy top-k: groups first, then experts of each chosen group."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moestro.routers.base import Router, check_top_k, context_notes
from moestro.routing import Context, Decision, SparseRouting, top_k


class TwoLevelNoisy(Router):
    """A noisy top-k gate over groups, and one over the experts of each group.

        y = sum_(i in K1) sum_(j in K2(i)) a1_i a2_(i,j) f_(i,j)(x)
        load_(i,j) = load2_(i,j) load1_i / tokens sent to i,   load2 over the tokens that group i received
        Shazeer et al. 2017, appendix B, eqs. 12-14

    Both gates are those of `shazeer-noisy-topk`: noise of a learned size in training, softmax over the chosen.
    Expert (i, j) is number i * per_group + j.

    Args:
        width: model width.
        num_groups: groups.
        per_group: experts of a group.
        groups_per_token: groups chosen, k1.
        experts_per_group: experts chosen in each of them, k2.
        floor: smallest standard deviation of the noise.

    Parameters, zero at the start: group and group_noise `[groups, width]`, expert and expert_noise
    `[groups, per_group, width]`. Notes of the smooth load, with its gradient: `sent` (0 or 1) and
    `group_chance` `[tokens, groups]`, `place_chance` `[tokens, groups, per_group]`, 0 where not sent.
    """

    def __init__(
        self,
        width: int,
        num_groups: int,
        per_group: int,
        groups_per_token: int = 2,
        experts_per_group: int = 2,
        floor: float = 1e-2,
    ) -> None:
        super().__init__()
        self.groups_per_token = check_top_k(groups_per_token, num_groups)
        self.experts_per_group = check_top_k(experts_per_group, per_group)
        self.num_experts, self.top_k = num_groups * per_group, groups_per_token * experts_per_group
        self.floor = floor
        self.group = nn.Parameter(torch.zeros(num_groups, width))
        self.group_noise = nn.Parameter(torch.zeros(num_groups, width))
        self.expert = nn.Parameter(torch.zeros(num_groups, per_group, width))
        self.expert_noise = nn.Parameter(torch.zeros(num_groups, per_group, width))

    def decide(self, x: Tensor, context: Context) -> Decision:
        clean1, noisy1, std1 = self._score(x, self.group, self.group_noise)
        clean2, noisy2, std2 = self._score(x, self.expert, self.expert_noise)  # [tokens, groups, per_group]
        group = top_k(noisy1, self.groups_per_token)
        place = top_k(noisy2, self.experts_per_group)
        within = noisy2.gather(2, place).softmax(-1)  # [tokens, groups, k2]
        chosen = group.unsqueeze(2).expand(-1, -1, self.experts_per_group)
        index = (chosen * noisy2.shape[2] + place.gather(1, chosen)).flatten(1)
        weight = (noisy1.gather(1, group).softmax(-1).unsqueeze(2) * within.gather(1, chosen)).flatten(1)
        keep = None if context.valid is None else context.valid.unsqueeze(1).expand_as(index)
        routing = SparseRouting.from_choice(index, weight, self.num_experts, keep)
        sent = torch.zeros_like(noisy1).scatter(1, group, 1.0)
        notes = {**context_notes(context), "choice": index}
        notes |= {} if keep is None else {"kept": keep}
        notes["sent"] = sent
        notes["group_chance"] = chance(clean1, noisy1, std1, self.groups_per_token)
        notes["place_chance"] = chance(clean2, noisy2, std2, self.experts_per_group) * sent.unsqueeze(2)
        logits = (clean1.log_softmax(-1).unsqueeze(2) + clean2.log_softmax(-1)).flatten(1)
        return Decision(routing, logits, logits.exp(), notes)

    def _score(self, x: Tensor, weight: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Clean logits, noisy logits and standard deviation (None in evaluation)."""
        clean = torch.einsum("tw,...w->t...", x, weight.to(x.dtype))
        if not self.training:
            return clean, clean, None
        std = F.softplus(torch.einsum("tw,...w->t...", x, noise.to(x.dtype))) + self.floor
        return clean, clean + torch.randn_like(clean) * std, std


def chance(clean: Tensor, noisy: Tensor, std: Tensor | None, k: int) -> Tensor:
    """Chance that an entry stays among the k best if its noise is drawn again; 1 or 0 without noise.

    Shapes: `[..., experts]` -> the same.
    """
    chosen = torch.zeros_like(noisy, dtype=torch.bool).scatter(-1, top_k(noisy, k), True)
    if std is None or k == noisy.shape[-1]:
        return chosen.to(noisy.dtype)
    ranked = noisy.sort(dim=-1, descending=True, stable=True).values
    threshold = torch.where(chosen, ranked[..., k : k + 1], ranked[..., k - 1 : k])
    return torch.special.ndtr((clean - threshold) / std)
