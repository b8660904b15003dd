"""What every router is: hidden states and context in, a Decision out, in float32."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moestro.routing import Context, Decision


class Router(nn.Module, ABC):
    """Decides which experts serve which tokens.

    Routers compute in float32, also in bfloat16 models and under autocast (Fedus et al. 2021, section 2.4);
    float64 inputs stay float64.

    Attributes:
        num_experts: number of experts that it chooses among.
        top_k: experts that serve a token, on average.
        causal: later tokens cannot change what happens to earlier ones.
        causal_evaluation: that holds in evaluation, by a rule of its own, though not in training.
        batch_independent: a sequence's decision does not depend on the others of the batch.
        objective: what a model of it is trained for: `next-token`, `two-passes` or `policy-gradient`.
        needs_history: a token's decision needs the tokens before it in the same call, so that generation cannot
            feed one token at a time.
    """

    num_experts: int
    top_k: float
    causal: bool = True
    causal_evaluation: bool = False
    batch_independent: bool = True
    objective: str = "next-token"
    needs_history: bool = False

    def forward(self, x: Tensor, context: Context | None = None) -> Decision:
        """Decide for one call.

        Shapes: x `[tokens, width]`.

        Raises:
            ValueError: a context that does not have one entry per token, or lacks what this router needs.
        """
        context = context or Context()
        context.check(len(x))
        if context.valid is not None:
            x = x.masked_fill(~context.valid.unsqueeze(1), 0)  # padding may hold anything, also NaN
        x = x if x.dtype == torch.float64 else x.float()
        if not torch.is_autocast_enabled(x.device.type):  # leaving it costs as much as a small product
            return self.decide(x, context)
        with torch.autocast(x.device.type, enabled=False):
            return self.decide(x, context)

    @abstractmethod
    def decide(self, x: Tensor, context: Context) -> Decision:
        """The decision itself; `x [tokens, width]` is float32 or float64."""


class Float32Buffers(nn.Module):
    """A module whose own float32 buffers stay so when the model is cast: bfloat16 loses small updates."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            moved = self._buffers[name]
            if buffer.dtype == torch.float32 and moved is not None and moved.dtype != torch.float32:
                self._buffers[name] = buffer.to(moved.device)
        return self


def context_notes(context: Context) -> dict[str, Tensor]:
    """The facts of the context that losses and inspection need beside a decision."""
    facts = {name: getattr(context, name) for name in ("valid", "sequence", "domain", "device")}
    return {name: value for name, value in facts.items() if value is not None}


def shared_draw(draw: Tensor) -> Tensor:
    """A random number that all ranks share: that of rank 0, if torch.distributed runs."""
    if dist.is_available() and dist.is_initialized():
        dist.broadcast(draw, src=0)
    return draw


def check_top_k(k: int, num_experts: int) -> int:
    """k itself, or ValueError if so many experts cannot be chosen."""
    if not 1 <= k <= num_experts:
        raise ValueError(
            f"top_k={k} but there are {num_experts} experts; pass 1 <= top_k <= {num_experts} or add experts"
        )
    return k
