"""Noise on the logits, in training only. A noise answers the noisy logits and notes about them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moestro.routing.context import NO_CONTEXT, Context


class NoNoise(nn.Module):
    """Leaves the logits as they are."""

    def forward(self, x: Tensor, logits: Tensor, context: Context = NO_CONTEXT) -> tuple[Tensor, dict[str, Tensor]]:
        return logits, {}


class GaussianNoise(nn.Module):
    """Adds Gaussian noise of a learned, input-dependent size to the logits.

        noisy = logits + normal() * (softplus(x W_noise) + floor)        Shazeer et al. 2017, eq. 4

    Args:
        width: model width.
        num_experts: number of experts.
        floor: smallest standard deviation.

    Shapes: x `[tokens, width]`, logits `[tokens, experts]` -> `[tokens, experts]`; notes `noisy_logits` and
    `noise_std` of that shape. Weights `[experts, width]` start at zero: equal noise everywhere.
    """

    def __init__(self, width: int, num_experts: int, floor: float = 1e-2) -> None:
        super().__init__()
        self.floor = floor
        self.weight = nn.Parameter(torch.zeros(num_experts, width))

    def forward(self, x: Tensor, logits: Tensor, context: Context = NO_CONTEXT) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.training:
            return logits, {}
        std = F.softplus(F.linear(x, self.weight.to(x.dtype))) + self.floor
        noisy = logits + torch.randn_like(logits) * std
        return noisy, {"noisy_logits": noisy, "noise_std": std}

    def extra_repr(self) -> str:
        return f"floor={self.floor}"


class FixedNoise(nn.Module):
    """Adds Gaussian noise of one fixed size to the logits.

        noisy = logits + std * normal()        Riquelme et al. 2021: std = 1 / experts

    Args:
        std: standard deviation.

    Raises:
        ValueError: a standard deviation that is not above 0.

    Shapes: logits `[tokens, experts]` -> the same; notes `noisy_logits` and `noise_std` of that shape.
    """

    def __init__(self, std: float) -> None:
        super().__init__()
        if std <= 0:
            raise ValueError(f"noise of standard deviation {std} must be above 0; for none leave the noise out")
        self.std = std

    def forward(self, x: Tensor, logits: Tensor, context: Context = NO_CONTEXT) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.training:
            return logits, {}
        noisy = logits + self.std * torch.randn_like(logits)
        return noisy, {"noisy_logits": noisy, "noise_std": torch.full_like(logits, self.std)}

    def extra_repr(self) -> str:
        return f"std={self.std}"


class PerDomainNoise(nn.Module):
    """`GaussianNoise` whose size has a map for every domain: `std = softplus(x W_domain(t)) + floor`.

    Chen et al. 2023 (Mod-Squad). Weights `[domains, experts, width]` start at zero; needs `Context.domain`.

    Args:
        width: model width.
        num_experts: number of experts.
        num_domains: maps.
        floor: smallest standard deviation.
    """

    def __init__(self, width: int, num_experts: int, num_domains: int, floor: float = 1e-2) -> None:
        super().__init__()
        self.floor = floor
        self.weight = nn.Parameter(torch.zeros(num_domains, num_experts, width))

    def forward(self, x: Tensor, logits: Tensor, context: Context = NO_CONTEXT) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.training:
            return logits, {}
        domain = context.need("domain", "noise for each domain")
        size = torch.einsum("tw,mew->tme", x, self.weight.to(x.dtype))
        std = F.softplus(size[torch.arange(len(x), device=x.device), domain]) + self.floor
        noisy = logits + torch.randn_like(logits) * std
        return noisy, {"noisy_logits": noisy, "noise_std": std}
