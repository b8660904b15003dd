"""A transformer block whose MoE layer runs beside attention and a dense network."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from moestro.layers.moe import MoE
from moestro.routing import Context


class DenseMoEBlock(nn.Module):
    """Attention, a dense network after it, and a mixture that reads what attention reads.

        h = x + attention(norm_1(x));   y = h + dense(norm_2(h)) + moe(norm_3(x))        Snowflake 2024 (Arctic)

    The mixture does not wait for attention, so its communication overlaps with it.

    Args:
        attention: `[batch, length, width]` -> the same.
        dense: the dense network, e.g. a `FeedForward`.
        moe: the mixture.
        norm: makes a normalisation layer; called three times.
    """

    def __init__(self, attention: nn.Module, dense: nn.Module, moe: MoE, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.attention, self.dense, self.moe = attention, dense, moe
        self.attention_norm, self.dense_norm, self.moe_norm = norm(), norm(), norm()

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        routed = self.moe(self.moe_norm(x), context)
        x = x + self.attention(self.attention_norm(x))
        y: Tensor = x + self.dense(self.dense_norm(x)) + routed
        return y
