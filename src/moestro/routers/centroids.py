"""A gate of cluster centres."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.routers.scorers import Scorer
from moestro.routing.context import NO_CONTEXT, Context


class NearestCentroid(Scorer):
    """Near centres score high: `logits_e = -sharpness * |x - c_e|^2`        Royer et al. 2022

    Args:
        width: model width.
        num_experts: centres; `fit` places them by k-means, training moves them.
        sharpness: scale of the logits, above 0; large keeps the clusters apart.

    Shapes: x `[tokens, width]` -> `[tokens, experts]`; centre `[experts, width]`.
    """

    def __init__(self, width: int, num_experts: int, sharpness: float = 1.0) -> None:
        super().__init__()
        if sharpness <= 0:
            raise ValueError(f"sharpness={sharpness} must be above 0")
        self.num_experts, self.sharpness = num_experts, sharpness
        self.centre = nn.Parameter(torch.randn(num_experts, width))

    @torch.no_grad()
    def fit(self, x: Tensor, iterations: int = 50, seed: int = 0) -> None:
        """Put the centres where k-means finds clusters in `x [rows, width]`; a centre without rows stays.

        Raises:
            ValueError: fewer rows than centres.
        """
        if len(x) < self.num_experts:
            raise ValueError(f"{len(x)} rows cannot make {self.num_experts} clusters; pass more data")
        generator = torch.Generator().manual_seed(seed)
        centre = x[torch.randperm(len(x), generator=generator)[:1].to(x.device)]
        while len(centre) < self.num_experts:  # each new start is the row farthest from those so far
            far = torch.cdist(x, centre).amin(1).argmax()
            centre = torch.cat([centre, x[far : far + 1]])
        for _ in range(iterations):
            nearest = torch.cdist(x, centre).argmin(1)
            count = nearest.bincount(minlength=self.num_experts).unsqueeze(1)
            total = torch.zeros_like(centre).index_add(0, nearest, x)
            centre = torch.where(count > 0, total / count.clamp(min=1), centre)
        self.centre.copy_(centre)

    def forward(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        away = x.unsqueeze(1) - self.centre.to(x.dtype)
        return -self.sharpness * away.square().sum(-1)
