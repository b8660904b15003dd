"""Norm, rotary positions and attention, each against its formula."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from moestro.models.attend import _by_matmul, attend
from moestro.models.attention import GroupedQueryAttention
from moestro.models.cache import KeyValueCache
from moestro.models.latent import LatentAttention
from moestro.models.norm import RMSNorm
from moestro.models.rotary import Rotary, rotate_halves, rotate_pairs


def test_rms_norm_is_its_formula():
    x, norm = torch.randn(3, 5, dtype=torch.float64), RMSNorm(5, eps=0.1).double()
    norm.weight.data = torch.randn(5, dtype=torch.float64)
    assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * norm.weight)


def test_rms_norm_keeps_the_dtype_of_its_input():
    assert RMSNorm(8)(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("rotate", [rotate_halves, rotate_pairs])
def test_rotated_products_depend_on_distance_only(rotate):
    rotary = Rotary(8, 20).double()
    query, key = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def product(at, other):
        return (rotate(query, *rotary(at, 1)) * rotate(key, *rotary(other, 1))).sum()

    assert_close(product(3, 1), product(17, 15), atol=1e-6, rtol=0)
    assert abs(product(3, 1) - product(3, 2)) > 1e-3


def test_both_orders_are_the_same_rotation_of_reordered_features():
    x, rotary = torch.randn(2, 5, 3, 8), Rotary(8, 5)(0, 5)
    reordered = torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)
    assert_close(rotate_pairs(x, *rotary), rotate_halves(reordered, *rotary))


def test_rotary_refuses_an_odd_head():
    with pytest.raises(ValueError, match="even"):
        Rotary(7, 10)


def test_written_out_attention_equals_the_fused_one():
    query = torch.randn(2, 7, 6, 8, dtype=torch.float64, requires_grad=True)
    key, value = torch.randn(2, 7, 3, 8, dtype=torch.float64), torch.randn(2, 7, 3, 5, dtype=torch.float64)
    outputs = [f(query, key, value) for f in (_by_matmul, lambda *qkv: attend(*qkv, mask=None))]
    assert_close(*outputs)
    assert_close(*[torch.autograd.grad(y.square().sum(), query)[0] for y in outputs])


def test_short_bfloat16_attention_is_close_to_float32():
    qkv = torch.randn(3, 2, 16, 4, 8)
    reduced = attend(*qkv.bfloat16(), mask=None)
    assert_close(reduced.float(), attend(*qkv, mask=None), atol=3e-2, rtol=3e-2)


ATTENTIONS = {
    "plain": lambda: GroupedQueryAttention(16, 4, 4, 6),
    "grouped": lambda: GroupedQueryAttention(16, 4, 2, 6),
    "head norm": lambda: GroupedQueryAttention(16, 4, 2, 6, qk_norm="head"),
    "full norm": lambda: GroupedQueryAttention(16, 4, 2, 6, qk_norm="full"),
    "latent": lambda: _latent(None, value_dim=5),
    "latent, query latent": lambda: _latent(7, value_dim=5),
    "latent, wide values": lambda: _latent(None, value_dim=13),
}


def _latent(q_lora_rank, value_dim):
    return LatentAttention(
        16, 4, q_lora_rank=q_lora_rank, kv_lora_rank=9, nope_dim=6, rope_dim=4, value_dim=value_dim
    )


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_attention_is_causal_and_cached_in_pieces_the_same(kind):
    attention = ATTENTIONS[kind]().double()
    rotary = Rotary(attention.rotary_dim, 12).double()
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    whole = attention(x, rotary(0, 12))
    changed = torch.cat([x[:, :7], torch.randn(2, 5, 16, dtype=torch.float64)], dim=1)
    assert_close(attention(changed, rotary(0, 12))[:, :7], whole[:, :7])
    cache = KeyValueCache([attention.cache_shapes()], 2, 12, torch.float64, torch.device("cpu"))
    pieces = []
    for start, length in ((0, 7), (7, 4), (11, 1)):
        mask = torch.ones(length, start + length, dtype=torch.bool).tril(start)[None, None] if start else None
        pieces.append(attention(x[:, start : start + length], rotary(start, length), mask, cache.layers[0]))
    assert_close(torch.cat(pieces, dim=1), whole)


def test_latent_attention_caches_latents_only():
    assert _latent(None, 5).cache_shapes() == ((9,), (1, 4))


def test_grouped_query_attention_is_its_formula():
    attention = GroupedQueryAttention(16, 4, 2, 6).double()
    rotary, x = Rotary(6, 5).double()(0, 5), torch.randn(1, 5, 16, dtype=torch.float64)
    query, key, value = attention.project(x)
    query, key = rotate_halves(query, *rotary), rotate_halves(key, *rotary)
    heads = []
    for head in range(4):
        scores = query[0, :, head] @ key[0, :, head // 2].T / 6**0.5
        scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
        heads.append(F.softmax(scores, dim=-1) @ value[0, :, head // 2])
    assert_close(attention(x, rotary)[0], attention.output(torch.cat(heads, dim=-1)))


@pytest.mark.parametrize(("heads", "kv_heads", "stored"), [(4, 4, 7), (4, 2, 1), (8, 2, 70)])
def test_one_new_position_attends_like_the_last_of_many(heads, kv_heads, stored):
    query = torch.randn(2, 1, heads, 16).bfloat16()
    key, value = torch.randn(2, 2, stored, kv_heads, 16).bfloat16().unbind(0)
    got = attend(query, key, value, None)
    with torch.no_grad():  # one sequence has a way of its own
        alone = torch.cat(
            [attend(*part, None) for part in zip(query.split(1), key.split(1), value.split(1), strict=True)]
        )
    assert_close(alone, got, rtol=2e-2, atol=2e-2)
    q = query.double().view(2, kv_heads, heads // kv_heads, 16)
    shares = torch.einsum("bhgd,bshd->bhgs", q, key.double()).div(4).softmax(-1)
    expected = torch.einsum("bhgs,bshd->bhgd", shares, value.double())
    assert_close(got.double().view_as(expected), expected, rtol=2e-2, atol=2e-2)
