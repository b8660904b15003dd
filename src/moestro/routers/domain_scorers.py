"""Scorers that read the domain of a token: its task, language or source."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.routers.ids import ids_of
from moestro.routers.scorers import Scorer
from moestro.routing.context import NO_CONTEXT, Context


class PerDomainLinear(Scorer):
    """A matrix for every domain: `logits = x W_domain(t)`        Ma et al. 2018 (MMoE), eq. 6

    Args:
        width: model width.
        num_experts: number of experts.
        num_domains: matrices.
        pool: experts that a domain may use, `[domains, experts]` bool; the logits of others are -inf. None = all.
        std: standard deviation of the initial weights `[domains, experts, width]`.

    Shapes: x `[tokens, width]` -> `[tokens, experts]`; needs `Context.domain`.
    """

    pool: Tensor | None

    def __init__(
        self, width: int, num_experts: int, num_domains: int, pool: Tensor | None = None, std: float = 0.02
    ) -> None:
        super().__init__()
        self.num_experts, self.num_domains = num_experts, num_domains
        self.weight = nn.Parameter(torch.randn(num_domains, num_experts, width) * std)
        self.register_buffer("pool", pool, persistent=False)

    def forward(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        domain = ids_of(context, "domain", self.num_domains, "a gate for each domain")
        each = torch.einsum("tw,mew->tme", x, self.weight.to(x.dtype))  # every gate on every token: gates are small
        logits = each[torch.arange(len(x), device=x.device), domain]
        return logits if self.pool is None else logits.masked_fill(~self.pool[domain], -torch.inf)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, num_domains={self.num_domains}"
