"""Causal self-attention with key-value heads shared by groups of query heads."""

from __future__ import annotations

from torch import Tensor, nn

from moestro.models.attend import attend
from moestro.models.cache import LayerCache
from moestro.models.norm import RMSNorm
from moestro.models.rotary import rotate_halves


class GroupedQueryAttention(nn.Module):
    """Attention whose key-value heads each serve a group of query heads (Ainslie et al. 2023).

        y = concat_h softmax(rotate(q_h) rotate(k_g)^T / sqrt(head_dim)) v_g W_o    g = group of head h

    The three input projections are one matrix, rows in the order query, key, value.

    Args:
        width: model width.
        num_heads: query heads.
        num_kv_heads: key-value heads; divides num_heads.
        head_dim: features of a head.
        qk_norm: "none", "head" (RMSNorm over each head, as Qwen3) or "full" (over all heads at once, as OLMoE).
        eps: of those norms.

    Shapes: x `[batch, length, width]`, rotary `[length, 1, head_dim / 2]` twice,
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
    ):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim, self.qk_norm = (
            num_heads,
            num_kv_heads,
            head_dim,
            qk_norm,
        )
        self.qkv = nn.Linear(width, (num_heads + 2 * num_kv_heads) * head_dim, bias=False)
        self.output = nn.Linear(num_heads * head_dim, width, bias=False)
        self.query_norm = self._norm(num_heads, eps)
        self.key_norm = self._norm(num_kv_heads, eps)

    @property
    def rotary_dim(self) -> int:
        return self.head_dim

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
        query, key = rotate_halves(query, *rotary), rotate_halves(key, *rotary)
        if cache is not None:
            key, value = cache.append(key, value)
        return self.output(attend(query, key, value, mask, whole=cache is None))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values before rotation, each `[batch, length, heads, head_dim]`."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        query, key, value = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=2)
        return self._normalise(query, self.query_norm), self._normalise(key, self.key_norm), value

    def _norm(self, num_heads: int, eps: float) -> nn.Module:
        size = {"none": 0, "head": self.head_dim, "full": num_heads * self.head_dim}[self.qk_norm]
        return RMSNorm(size, eps) if size else nn.Identity()

    def _normalise(self, heads: Tensor, norm: nn.Module) -> Tensor:
        return norm(heads.flatten(2)).view_as(heads) if self.qk_norm == "full" else norm(heads)
