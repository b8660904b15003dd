"""Checks of the catalogue: mixed tokens, mixed parameters and retrieval (mixture-of-tokens, lory, peer)."""

import pytest
import torch
from torch.testing import assert_close

import moestro
from moestro.routers.product_key import ProductKeys
from moestro.routers.retrieval import Retrieval
from moestro.routing import Context


def layer(name, num_experts=4, **options):
    moe = moestro.build(name, width=5, hidden=3, num_experts=num_experts, activation="relu", **options).double()
    with torch.no_grad():
        for parameter in moe.router.parameters():
            parameter.normal_(0, 0.7)
    return moe


def batch(sequences, length):
    return torch.randn(sequences, length, 5, dtype=torch.float64)


def one(moe, e, x):
    return (x @ moe.experts.up[e]).relu() @ moe.experts.down[e]


# mixture-of-tokens


@pytest.mark.parametrize("emission", ["same", "experts"])
def test_mixture_of_tokens_mixes_one_position_of_a_group_of_sequences(emission):
    moe, x = layer("mixture-of-tokens", group_size=2, temperature=0.5, emission=emission), batch(3, 4)
    valid = torch.ones(3, 4, dtype=torch.bool)
    valid[1, 2] = False
    y = moe(x, Context(valid=valid.flatten()))
    z = x @ moe.router.scorer.weight.T / 0.5
    for position in range(4):
        for group in ([0, 1], [2]):
            members = [s for s in group if valid[s, position]]
            rows, logits = x[members, position], z[members, position]
            m = logits.softmax(0)
            back = m if emission == "same" else logits.softmax(1)
            expected = sum(back[:, e : e + 1] * one(moe, e, m[:, e] @ rows) for e in range(4))
            assert_close(y[members, position], expected)
    assert not y[1, 2].detach().any()


def test_mixture_of_tokens_group_of_one_is_the_sum_of_experts():
    moe, x = layer("mixture-of-tokens", group_size=1), batch(3, 2)
    assert_close(moe(x), sum(one(moe, e, x) for e in range(4)))


def test_mixture_of_tokens_without_controller_all_of_a_group_get_the_same():
    moe, x = layer("mixture-of-tokens"), batch(3, 4)
    moe.router.scorer.weight.data.zero_()
    y = moe(x)
    assert_close(y, y[:1].expand_as(y))


def test_mixture_of_tokens_later_positions_of_no_sequence_reach_back():
    moe, x = layer("mixture-of-tokens"), batch(3, 6)
    other = x.clone()
    other[:, 3:] = torch.randn_like(other[:, 3:])
    assert torch.equal(moe(x)[:, :3], moe(other)[:, :3])
    assert not torch.allclose(moe(x)[0], moe(torch.cat([x[:1], other[1:] + 1]))[0])


def test_mixture_of_tokens_groups_skip_sequences_without_tokens_and_need_positions():
    moe, x = layer("mixture-of-tokens", group_size=2), batch(3, 2)
    valid = torch.tensor([True, True, False, False, True, True])
    assert_close(moe(x, Context(valid=valid))[[0, 2]], moe(x[[0, 2]]))
    with pytest.raises(ValueError, match=r"mixing tokens of one position needs Context\.position"):
        moe(x[0])
    with pytest.raises(ValueError, match="temperature must be above 0"):
        layer("mixture-of-tokens", temperature=0.0)


# lory


def test_lory_segments_use_the_mixture_of_the_one_before():
    moe, x = layer("lory", segment_length=3), batch(2, 8)
    y = moe(x)
    for n in range(2):
        parts = [x[n, :3], x[n, 3:6], x[n, 6:]]
        e = [(part.mean(0) @ moe.router.scorer.weight.T).softmax(0) for part in parts]
        used = [e[0], e[0], e[1]]
        expected = []
        for part, share in zip(parts, used, strict=True):
            up = sum(share[i] * moe.experts.up[i] for i in range(4))
            down = sum(share[i] * moe.experts.down[i] for i in range(4))
            expected.append((part @ up).relu() @ down)
        assert_close(y[n], torch.cat(expected))


def test_lory_one_segment_gives_the_router_no_gradient():
    moe, x = layer("lory", segment_length=8), batch(2, 8)
    moe(x).sum().backward()
    assert moe.router.scorer.weight.grad is None or not moe.router.scorer.weight.grad.any()
    longer = layer("lory", segment_length=4)
    longer(x).sum().backward()
    assert longer.router.scorer.weight.grad.any()


def test_lory_only_the_first_segment_sees_its_own_later_tokens():
    moe, x = layer("lory", segment_length=4), batch(1, 12)
    for changed in range(12):
        other = x.clone()
        other[0, changed] += 1
        differs = ((moe(x) - moe(other))[0].detach().abs() > 1e-12).any(1)
        segment = changed // 4
        assert not differs[4:changed].any(), "segments after the first are causal"
        if segment == 0:
            assert differs[[t for t in range(4) if t != changed]].any()
        assert segment == 2 or differs[(segment + 1) * 4 : (segment + 2) * 4].any()
        assert not differs[(segment + 2) * 4 :].any()


def test_lory_merges_once_per_segment_and_ignores_padding():
    moe, x = layer("lory", segment_length=4), batch(1, 9)
    assert len(moe.route(x[0]).routing.mixture) == 3
    valid = torch.tensor([1, 0, 1, 1, 1, 0, 1, 1, 1]).bool()
    assert_close(moe(x, Context(valid=valid))[0, valid], moe(x[:, valid])[0])
    with pytest.raises(ValueError, match="segment_length=0 must be at least 1"):
        layer("lory", segment_length=0)


# hope-homoe


def test_hope_homoe_memory_answers_mean_or_nearest():
    keys, values = torch.eye(3, dtype=torch.float64) * 2, torch.randn(3, 3, dtype=torch.float64)
    query = torch.tensor([[0.1, 1.0, 0.3]], dtype=torch.float64)
    assert_close(Retrieval(keys, values, beta=0.0)(query), values.mean(0, keepdim=True))
    assert_close(Retrieval(keys, values, beta=1e3)(query), values[1:2])
    share = (1.5 * query @ keys.T).softmax(1)
    assert_close(Retrieval(keys, values, beta=1.5)(query), share @ values)
    with pytest.raises(ValueError, match="beta=-1"):
        Retrieval(keys, beta=-1)


def test_hope_homoe_routes_as_soft_moe():
    moe, soft, x = layer("hope-homoe", slots_per_expert=2), layer("soft-moe", slots_per_expert=2), batch(2, 4)
    soft.load_state_dict(moe.state_dict())
    assert torch.equal(moe(x), soft(x))


# peer


def brute_force(router, x):
    """Scores of all pairs of keys, head by head, and weights added up."""
    rows, columns = len(router.row), len(router.column)
    total = torch.zeros(len(x), rows * columns, dtype=x.dtype)
    for query in router.query:
        first, second = x @ query[0].T, x @ query[1].T
        score = torch.stack(
            [first @ router.row[e // columns] + second @ router.column[e % columns] for e in range(rows * columns)],
            1,
        )
        best = score.sort(dim=1, descending=True, stable=True)
        weight = best.values[:, : router.k].softmax(1)
        total = total.scatter_add(1, best.indices[:, : router.k], weight)
    return total


@pytest.mark.parametrize(("num_experts", "heads", "k"), [(16, 1, 3), (36, 4, 5), (12, 3, 12), (7, 2, 4)])
def test_peer_finds_the_best_pairs_of_keys(num_experts, heads, k):
    moe, x = layer("peer", num_experts, heads=heads, top_k=k, query_width=3), torch.randn(9, 5, dtype=torch.float64)
    decision = moe.route(x)
    decision.routing.check()
    matrix, expected = decision.routing.combine_matrix(), brute_force(moe.router, x)
    assert_close(matrix, expected)
    assert_close(matrix.sum(1), torch.full((9,), float(heads), dtype=torch.float64))
    parameters = list(moe.router.parameters())
    target = torch.randn_like(matrix)
    for a, b in zip(
        torch.autograd.grad((matrix * target).sum(), parameters),
        torch.autograd.grad((expected * target).sum(), parameters),
        strict=True,
    ):
        assert_close(a, b)


def test_peer_of_a_million_experts_makes_no_matrix_of_them():
    router = ProductKeys(8, 1_000_000, heads=2, k=4, query_width=4)
    assert (len(router.row), len(router.column)) == (1000, 1000)
    decision = router(torch.randn(3, 8))
    assert decision.logits is None
    assert decision.probs is None
    assert len(decision.routing.token) <= 24
    with pytest.raises(ValueError, match="top_k=17 but there are 16 experts"):
        layer("peer", 16, top_k=17)
    with pytest.raises(ValueError, match="heads=0"):
        layer("peer", 16, heads=0)
