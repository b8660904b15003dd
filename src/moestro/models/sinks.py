"""Attention with limits: a window of positions, and sinks that take a share of every query's attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def within_window(mask: Tensor | None, length: int, stored: int, window: int, device: torch.device) -> Tensor:
    """A mask that leaves each query the last `window` positions, its own included, of those it may see.

    Args:
        mask: where a query may look, `[batch or 1, 1, length, stored]` bool; None = plain causal attention.
        length: queries, which are the last of the stored positions.
        stored: keys.
        window: positions.

    Shapes: -> `[batch or 1, 1, length, stored]`.
    """
    near = torch.ones(length, stored, dtype=torch.bool, device=device)
    near = near.tril(stored - length).triu(stored - length - window + 1)[None, None]
    return near if mask is None else near & mask


def attend_with_sinks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor, scale: float | None = None
) -> Tensor:
    """Attention in which each head's sink takes part in the softmax and gives nothing.

        share_ij = exp(s_ij) / (exp(sink_h) + sum_j exp(s_ij))        OpenAI 2025 (gpt-oss); Xiao et al. 2023

    A key of zeros with the sink as its score stands for it.

    Shapes: as `attend`; sinks `[heads]`.
    """
    length, stored = query.shape[1], key.shape[1]
    if mask is None:
        mask = torch.ones(length, stored, dtype=torch.bool, device=query.device).tril(stored - length)[None, None]
    zeros = torch.zeros_like(mask, dtype=query.dtype)
    seen = zeros.masked_fill(~mask, -torch.inf)
    batch, heads = mask.shape[0], len(sinks)
    sink = sinks.to(query.dtype).view(1, heads, 1, 1).expand(batch, heads, length, 1)
    scores = torch.cat([seen.expand(batch, heads, length, stored), sink], dim=-1)
    y = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        F.pad(key.transpose(1, 2), (0, 0, 0, 1)),
        F.pad(value.transpose(1, 2), (0, 0, 0, 1)),
        attn_mask=scores,
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return y.transpose(1, 2).flatten(2)
