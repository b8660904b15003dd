"""Multi-head latent attention: keys and values are rebuilt from one small latent per position."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moestro.models.attend import attend
from moestro.models.cache import LayerCache
from moestro.models.norm import RMSNorm
from moestro.models.rotary import rotate_pairs

LATENT_EPS = 1e-6  # the released model normalises latents with this, whatever its other norms use


class LatentAttention(nn.Module):
    """The attention of DeepSeek-V2 and V3, which caches `kv_lora_rank + rope_dim` numbers per position.

        c = norm(x W_down),  k_h = [c W_uk_h ; rotate(x W_kr)],  v_h = c W_uv_h    DeepSeek-AI 2024 (V2), eqs. 9-19

    Args:
        width: model width.
        num_heads: heads.
        q_lora_rank: size of the query latent; None = one full projection.
        kv_lora_rank: size of the key-value latent.
        nope_dim: features of a head's query and key that are not rotated.
        rope_dim: features that are rotated; the key's are shared by all heads.
        value_dim: features of a head's value.
        temperature: what the scores are multiplied with beside 1 / sqrt(nope_dim + rope_dim).

    Shapes: as `GroupedQueryAttention`, rotary `[length, 1, rope_dim / 2]` twice.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        q_lora_rank: int | None,
        kv_lora_rank: int,
        nope_dim: int,
        rope_dim: int,
        value_dim: int,
        temperature: float = 1.0,
    ):
        super().__init__()
        self.num_heads, self.q_lora_rank, self.kv_lora_rank = num_heads, q_lora_rank, kv_lora_rank
        self.nope_dim, self.rope_dim, self.value_dim = nope_dim, rope_dim, value_dim
        self.scale = temperature * (nope_dim + rope_dim) ** -0.5
        query_size = num_heads * (nope_dim + rope_dim)
        if q_lora_rank is None:
            self.query = nn.Linear(width, query_size, bias=False)
        else:
            self.query_down = nn.Linear(width, q_lora_rank, bias=False)
            self.query_norm = RMSNorm(q_lora_rank, LATENT_EPS)
            self.query_up = nn.Linear(q_lora_rank, query_size, bias=False)
        self.latent = nn.Linear(width, kv_lora_rank + rope_dim, bias=False)
        self.latent_norm = RMSNorm(kv_lora_rank, LATENT_EPS)
        self.expand = nn.Linear(kv_lora_rank, num_heads * (nope_dim + value_dim), bias=False)
        self.output = nn.Linear(num_heads * value_dim, width, bias=False)

    @property
    def rotary_dim(self) -> int:
        return self.rope_dim

    @property
    def flops_per_pair(self) -> int:
        """Multiplications and additions for one query meeting one key, values padded as in `forward`."""
        qk_dim = self.nope_dim + self.rope_dim
        return 2 * self.num_heads * (qk_dim + max(qk_dim, self.value_dim))

    def cache_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (self.kv_lora_rank,), (1, self.rope_dim)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        query_nope, query_rope = self.project_query(x).split([self.nope_dim, self.rope_dim], dim=-1)
        latent, key_rope = self.latent(x).split([self.kv_lora_rank, self.rope_dim], dim=-1)
        latent, key_rope = self.latent_norm(latent), rotate_pairs(key_rope.unsqueeze(2), *rotary)
        if cache is not None:
            latent, key_rope = cache.append(latent, key_rope)
        query = torch.cat([query_nope, rotate_pairs(query_rope, *rotary)], dim=-1)
        key, value = self.expand_latent(latent, key_rope)
        # kernels want heads of one size: zeros behind the values are 1.5 times faster than the general path on CPU
        padding = query.shape[-1] - self.value_dim
        y = attend(query, key, F.pad(value, (0, max(padding, 0))), mask, whole=cache is None, scale=self.scale)
        return self.output(y.unflatten(-1, (self.num_heads, -1))[..., : self.value_dim].flatten(2))

    def project_query(self, x: Tensor) -> Tensor:
        """Queries before rotation `[batch, length, heads, nope_dim + rope_dim]`."""
        if self.q_lora_rank is None:
            query = self.query(x)
        else:
            query = self.query_up(self.query_norm(self.query_down(x)))
        return query.unflatten(-1, (self.num_heads, -1))

    def expand_latent(self, latent: Tensor, key_rope: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of every head from the latents `[batch, stored, kv_lora_rank]`."""
        heads = self.expand(latent).unflatten(-1, (self.num_heads, -1))
        key_nope, value = heads.split([self.nope_dim, self.value_dim], dim=-1)
        return torch.cat([key_nope, key_rope.expand(-1, -1, self.num_heads, -1)], dim=-1), value
