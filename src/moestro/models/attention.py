"""Causal self-attention with key-value heads shared by groups of query heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.models.attend import attend
from moestro.models.cache import LayerCache
from moestro.models.norm import RMSNorm
from moestro.models.rotary import rotate
from moestro.models.sinks import attend_with_sinks, within_window


class GroupedQueryAttention(nn.Module):
    """Attention whose key-value heads each serve a group of query heads (Ainslie et al. 2023).

        y = concat_h softmax(scale rotate(q_h) rotate(k_g)^T) v_g W_o    g = group of head h

    The three input projections are one matrix, rows in the order query, key, value.

    Args:
        width: model width.
        num_heads: query heads.
        num_kv_heads: key-value heads; divides num_heads.
        head_dim: features of a head.
        qk_norm: "none", "head" (RMSNorm over each head, as Qwen3), "full" (over all heads at once, as OLMoE) or
            "rotated" (over each head after rotation, as Hunyuan).
        eps: of those norms.
        bias: maps that add one: "none", "qkv" or "all".
        rotary_dim: rotated features, the first of a head; None = all.
        rotation: which features turn together: "halves" or neighbouring "pairs".
        scale: of the scores; None = 1 / sqrt(head_dim).
        window: positions that a query sees, its own included; None = all before it.
        sinks: whether each head has a learned sink (see `attend_with_sinks`).

    Shapes: x `[batch, length, width]`, rotary `[length, 1, rotary_dim / 2]` twice,
    mask `[batch or 1, 1, length, stored + length]` or None = causal -> `[batch, length, width]`.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        qk_norm: str = "none",
        eps: float = 1e-5,
        *,
        bias: str = "none",
        rotary_dim: int | None = None,
        rotation: str = "halves",
        scale: float | None = None,
        window: int | None = None,
        sinks: bool = False,
    ):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim, self.qk_norm = (
            num_heads,
            num_kv_heads,
            head_dim,
            qk_norm,
        )
        self.rotary_dim, self.rotation = rotary_dim or head_dim, rotation
        self.scale, self.window = scale, window
        self.qkv = nn.Linear(width, (num_heads + 2 * num_kv_heads) * head_dim, bias=bias != "none")
        self.output = nn.Linear(num_heads * head_dim, width, bias=bias == "all")
        self.query_norm = self._norm(num_heads, eps)
        self.key_norm = self._norm(num_kv_heads, eps)
        self.sinks = nn.Parameter(torch.zeros(num_heads)) if sinks else None

    @property
    def plain(self) -> bool:
        """Whether whole heads are turned in halves, after their norms."""
        return self.rotary_dim == self.head_dim and self.rotation == "halves" and self.qk_norm != "rotated"

    @property
    def flops_per_pair(self) -> int:
        """Multiplications and additions for one query meeting one key, over all heads."""
        return 4 * self.num_heads * self.head_dim

    def cache_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (self.num_kv_heads, self.head_dim), (self.num_kv_heads, self.head_dim)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        query, key, value = self.project(x)
        query, key = (rotate(each, *rotary, self.rotation) for each in (query, key))
        if self.qk_norm == "rotated":
            query, key = self.query_norm(query), self.key_norm(key)
        if cache is not None:
            key, value = cache.append(key, value)
        return self.output(self._mix(query, key, value, mask, whole=cache is None))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values before rotation, each `[batch, length, heads, head_dim]`."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        query, key, value = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=2)
        if self.qk_norm == "rotated":
            return query, key, value
        return self._normalise(query, self.query_norm), self._normalise(key, self.key_norm), value

    def _mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, whole: bool) -> Tensor:
        if self.window is not None:
            mask = within_window(mask, query.shape[1], key.shape[1], self.window, query.device)
        if self.sinks is not None:
            return attend_with_sinks(query, key, value, mask, self.sinks, self.scale)
        return attend(query, key, value, mask, whole=whole, scale=self.scale)

    def _norm(self, num_heads: int, eps: float) -> nn.Module:
        if self.qk_norm == "none":
            return nn.Identity()
        return RMSNorm(num_heads * self.head_dim if self.qk_norm == "full" else self.head_dim, eps)

    def _normalise(self, heads: Tensor, norm: nn.Module) -> Tensor:
        return norm(heads.flatten(2)).view_as(heads) if self.qk_norm == "full" else norm(heads)
