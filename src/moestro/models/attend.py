"""Scaled dot-product attention, by the way that is fastest for the sizes at hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SHORT = 512


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    whole: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Mix values by the likeness of queries and keys; causal when there is no mask and more than one query.

    `whole` says that the queries are a whole sequence, so that a graph for any length need not ask how many.
    `scale` is that of the scores; None = 1 / sqrt(head_dim).

    Shapes: `[batch, length, heads, head_dim]` three times, keys and values with as many heads or a divisor,
    mask `[batch or 1, 1, length, stored + length]` or None -> `[batch, length, heads * head_dim]`.
    """
    if mask is None and _short_on_cpu(query, key):
        return _by_matmul(query, key, value, scale)
    if mask is None and query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.shape[1] == 1:
        return _one_query(query, key, value, scale)
    y = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None and (whole or query.shape[1] > 1),
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return y.transpose(1, 2).flatten(2)


def _short_on_cpu(query: Tensor, key: Tensor) -> bool:
    """Where plain matrix products win: bfloat16 on a CPU, up to 512 positions.

    Measured on 2 cores with AVX512-BF16, forward and backward, 4096 tokens: 8 heads of 64 at length 256 take 22 ms
    against 57 ms of the fused kernel, 4 heads of 48 at length 512 25 against 39, at length 1024 73 against 45.
    """
    length = query.shape[1]
    return query.device.type == "cpu" and query.dtype == torch.bfloat16 and length == key.shape[1] <= SHORT


def _one_query(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """One new position against the stored ones, by elementwise products: bound by the bytes of the cache.

    For one bfloat16 query of 16 heads over 540 positions torch's fused kernel takes about 0.9 ms on 2 cores, most
    of it not for reading the cache; `benchmarks/model.py` measures the whole.
    """
    batch, _, num_kv_heads, head_dim = key.shape
    query = query.view(batch, 1, num_kv_heads, -1, head_dim)
    products = key.unsqueeze(3) * query  # [batch, stored, key-value heads, group, head_dim]
    scores = products.sum(-1, dtype=torch.float32).flatten(2).transpose(1, 2)  # [batch, heads, stored]
    shares = torch.softmax(scores.mul_(scale or head_dim**-0.5).contiguous(), dim=-1).to(value.dtype)
    if batch == 1 and value.is_contiguous() and not torch.is_grad_enabled():
        return _mixed(shares[0], value[0]).view(1, 1, -1)
    shares = shares.transpose(1, 2).view(batch, -1, num_kv_heads, query.shape[3], 1)
    return (value.unsqueeze(3) * shares).sum(1).view(batch, 1, -1)


def _mixed(shares: Tensor, value: Tensor) -> Tensor:
    """Weighted sums of stored values, read in place: shares `[heads, stored]`, value `[stored, kv_heads, dim]`."""
    heads, stored = shares.shape
    num_kv_heads = value.shape[1]
    own = torch.arange(heads).div(heads // num_kv_heads, rounding_mode="floor").unsqueeze(1)
    index = own + torch.arange(0, stored * num_kv_heads, num_kv_heads)  # [heads, stored]
    starts = torch.arange(0, heads * stored, stored)
    return torch.embedding_bag(value.flatten(0, 1), index.view(-1), starts, False, 0, False, shares.view(-1))[0]


def _by_matmul(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """Causal attention with the scores written out; the query heads of a group lie behind each other as rows."""
    batch, length, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[2]
    rows = query.transpose(1, 2).reshape(batch * num_kv_heads, num_heads // num_kv_heads * length, head_dim)
    keys, values = key.transpose(1, 2).flatten(0, 1), value.transpose(1, 2).flatten(0, 1)
    future = torch.full((length, length), -torch.inf, dtype=query.dtype).triu(1)
    future = future.repeat(num_heads // num_kv_heads, 1)
    scores = torch.baddbmm(future, rows, keys.transpose(1, 2), alpha=scale or head_dim**-0.5)
    y = torch.softmax(scores, dim=-1) @ values
    return y.view(batch, num_heads, length, value.shape[3]).transpose(1, 2).flatten(2)
