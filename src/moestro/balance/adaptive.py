"""Losses whose weight follows a measurement, and the controllers that move it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.balance.controllers import Controller
from moestro.balance.counts import chosen_and_dropped, counted_choices, noted, valid_tokens
from moestro.balance.loss import Loss, Sums
from moestro.layers import MoE
from moestro.routers.base import Float32Buffers
from moestro.routing import Decision


class AdaptiveLoss(Float32Buffers, Loss):
    """A loss times a number that a controller moves after each step; the number is saved with the weights.

    Args:
        loss: what is scaled.
        start: the number at first.
    """

    scale: Tensor

    def __init__(self, loss: Loss, start: float) -> None:
        super().__init__()
        self.loss = loss
        self.register_buffer("scale", torch.tensor(start, dtype=torch.float32))

    def forward(self, decision: Decision) -> Tensor:
        return self.value(self.sums(decision))

    def sums(self, decision: Decision) -> dict[str, Tensor]:
        return self.loss.sums(decision)

    def value(self, sums: Sums) -> Tensor:
        return self.scale.clone() * self.loss.value(sums)


class AdaptiveSparsity(Controller):
    """Moves the weight of a sparsity loss until tokens use the wanted number of experts.

        scale <- scale * rate^sign((1 - k/E) - sparsity),   sparsity = share of (token, expert) pairs not used
        Wang et al. 2024 (ReMoE), eq. 9; measured per layer

    Args:
        loss: name of the layer's `AdaptiveLoss`.
        top_k: experts per token to aim at.
        rate: factor of one step, above 1.

    Raises:
        ValueError: a rate that cannot act.
    """

    def __init__(self, loss: str, top_k: float, rate: float = 1.2) -> None:
        if rate <= 1:
            raise ValueError(f"rate={rate} must be above 1 to move the weight of the loss")
        self.loss, self.top_k, self.rate = loss, top_k, rate

    def measure(self, decision: Decision) -> Tensor:
        """Pairs used and valid tokens, `[2]`."""
        choice = noted(decision, "choice")
        used = counted_choices(decision, choice).sum()
        return torch.stack([used, valid_tokens(decision, len(choice)).sum()])

    def check(self, moe: MoE) -> None:
        """Raises ValueError for a layer without that loss."""
        adaptive_loss(moe, self.loss)

    @torch.no_grad()
    def update(self, moe: MoE, measured: Tensor) -> None:
        """Adjust the loss's scale. Shapes: measured `[2]`."""
        used, tokens = self.summed(measured).tolist()
        excess = used - self.top_k * tokens
        adaptive_loss(moe, self.loss).scale *= self.rate ** ((excess > 0) - (excess < 0))

    def __repr__(self) -> str:
        return f"AdaptiveSparsity(top_k={self.top_k}, rate={self.rate})"


class FollowDrops(Controller):
    """Lets the weight of a balance loss follow the share of choices that are dropped.

        scale <- decay * scale + (1 - decay) * min(gain * dropped, largest)        Wei et al. 2024, eqs. 4-5

    Args:
        loss: name of the layer's `AdaptiveLoss`.
        gain: weight per share dropped.
        largest: weight at most.
        decay: how much of the old weight stays at each step.

    Raises:
        ValueError: a decay outside 0 to 1.
    """

    def __init__(self, loss: str, gain: float = 0.2, largest: float = 0.01, decay: float = 0.99) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} must be at least 0 and below 1")
        self.loss, self.gain, self.largest, self.decay = loss, gain, largest, decay

    def measure(self, decision: Decision) -> Tensor:
        """Choices dropped and choices made, `[2]`."""
        noted(decision, "choice")
        made, dropped = chosen_and_dropped(decision)
        return torch.stack([dropped, made])

    def check(self, moe: MoE) -> None:
        """Raises ValueError for a layer without that loss."""
        adaptive_loss(moe, self.loss)

    @torch.no_grad()
    def update(self, moe: MoE, measured: Tensor) -> None:
        """Adjust the loss's scale. Shapes: measured `[2]`."""
        dropped, made = self.summed(measured).tolist()
        aim = min(self.gain * dropped / max(made, 1), self.largest)
        scale = adaptive_loss(moe, self.loss).scale
        scale.mul_(self.decay).add_((1 - self.decay) * aim)

    def __repr__(self) -> str:
        return f"FollowDrops(gain={self.gain}, largest={self.largest}, decay={self.decay})"


def adaptive_loss(moe: MoE, name: str) -> AdaptiveLoss:
    """The adaptive loss of that name, or ValueError."""
    loss: nn.Module | object = moe.losses[name][1] if name in moe.losses else None
    if not isinstance(loss, AdaptiveLoss):
        raise ValueError(f"this controller needs an AdaptiveLoss called {name!r} in the layer's losses")
    return loss
