"""Checks of the catalogue: what looks at experts or kinds of tokens (mole, omni-smola, hypermoe)."""

import math

import pytest
import torch
from torch.testing import assert_close

import moestro
from moestro.balance import RoutingLog
from moestro.balance.product import product_balance
from moestro.experts.hyper import HyperExperts
from moestro.routing import Context


def layer(name, num_experts=4, lively=True, **options):
    moe = moestro.build(name, width=5, hidden=3, num_experts=num_experts, activation="relu", **options).double()
    with torch.no_grad():
        for parameter in moe.router.parameters() if lively else ():
            if parameter.dim():
                parameter.normal_(0, 0.5)
    return moe


def tokens(count):
    return torch.randn(count, 5, dtype=torch.float64)


def one(experts, e, x):
    return (x @ experts.up[e]).relu() @ experts.down[e]


# mole


def normed(v):
    return (v - v.mean(-1, keepdim=True)) / (v.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("length", [None, 3])
def test_mole_gate_reads_the_outputs_of_all_experts(length):
    moe, x = layer("mole", length=length), tokens(6)
    moe.router.temperature.data.fill_(0.5)
    sequence = torch.arange(6) // 3
    y = moe(x, Context(sequence=sequence))
    for n in range(2):
        mine = x[sequence == n]
        outputs = torch.stack([one(moe.experts, e, mine) for e in range(4)], 1)  # [tokens, experts, width]
        features = normed(outputs)
        features = features.flatten() if length else features.mean(0).flatten()
        g = (moe.router.gate @ features / 0.5).softmax(0)
        assert_close(y[sequence == n], torch.einsum("e,tew->tw", g, outputs))


def test_mole_one_expert_has_weight_one_and_the_gate_owns_no_experts():
    moe, x = layer("mole", 1), tokens(4)
    assert_close(moe.route(x).probs, torch.ones(4, 1, dtype=torch.float64))
    assert sorted(name for name, _ in moe.router.named_parameters()) == ["gate", "temperature"]
    moe.experts.requires_grad_(False)
    layer("mole")(x).sum().backward()


def test_mole_experts_can_be_left_out_without_retraining():
    moe, x = layer("mole"), tokens(5)
    before = moe.route(x).probs
    moe.router.keep([0, 2])
    kept = before[:, [0, 2]] / before[:, [0, 2]].sum(1, keepdim=True)
    decision = moe.route(x)
    assert_close(decision.probs[:, [0, 2]], kept)
    assert decision.routing.load().tolist() == [5, 0, 5, 0]
    for wrong in ([], [4]):
        with pytest.raises(ValueError, match="keep one or more of the experts 0 to 3"):
            moe.router.keep(wrong)
    with pytest.raises(ValueError, match="reads sequences of 3 tokens, got 5"):
        layer("mole", length=3)(x)


def test_mole_balance_is_least_when_shares_are_even_over_layers():
    moe, x = layer("mole"), tokens(3)
    moe.router.gate.data.zero_()
    assert_close(product_balance([moe.route(x)]), torch.tensor(4 * math.log(4), dtype=torch.float64))
    layers = torch.nn.ModuleList([layer("mole"), layer("mole")])
    log = RoutingLog(layers)
    with log.recording():
        for each in layers:
            each(x)
    decisions = [d for made in log.decisions.values() for d in made]
    q = sum(decision.probs.mean(0) for decision in decisions) / 2
    assert_close(product_balance(decisions), -q.log().sum())
    assert product_balance(decisions) > 4 * math.log(4)


# omni-smola


def test_omni_smola_sets_take_their_kind_of_token_and_add_up():
    moe, x, kind = layer("omni-smola", 7, text=2, visual=2), tokens(6), torch.tensor([0, 1, 1, 0, 1, 0])
    z = x @ moe.router.scorer.weight.T
    y = moe(x, Context(domain=kind))
    for t in range(6):
        expected = torch.zeros(5, dtype=torch.float64)
        for first, last, only in ((0, 3, None), (3, 5, 0), (5, 7, 1)):
            if only is None or only == kind[t]:
                g = z[t, first:last].softmax(0)
                expected = expected + sum(g[e] * one(moe.experts, first + e, x[t]) for e in range(last - first))
        assert_close(y[t], expected)


def test_omni_smola_visual_experts_never_change_text():
    moe, x, kind = layer("omni-smola", 6), tokens(8), torch.arange(8) % 2
    before = moe(x, Context(domain=kind)).detach()
    moe.experts.down.data[4:] += 1
    after = moe(x, Context(domain=kind)).detach()
    assert torch.equal(before[kind == 0], after[kind == 0])
    assert not torch.allclose(before[kind == 1], after[kind == 1])


def test_omni_smola_zero_experts_leave_the_base_model_and_sizes_must_fit():
    moe, x = layer("omni-smola"), tokens(4)
    moe.experts.down.data.zero_()
    assert not moe(x, Context(domain=torch.zeros(4, dtype=torch.long))).detach().any()
    with pytest.raises(ValueError, match=r"sets of \[-1, 3, 2\] experts do not add up to the 4"):
        layer("omni-smola", text=3, visual=2)
    with pytest.raises(ValueError, match=r"Context\.domain holds 2 but"):
        moe(x, Context(domain=torch.full((4,), 2)))


# hypermoe


def test_hypermoe_adds_an_adapter_made_from_the_experts_not_chosen():
    moe, x = layer("hypermoe", top_k=2, adapter_rank=3, embedding_size=4, hyper_hidden=6).eval(), tokens(7)
    for head in moe.experts.network.heads:
        head.data.normal_()
    p = (x @ moe.router.scorer.weight.T).softmax(1)
    y, bank = moe(x), moe.experts
    for t in range(7):
        best = p[t].sort(descending=True, stable=True).indices[:2].tolist()
        q = sum(bank.embedding[e] for e in range(4) if e not in best)
        c = bank.network.second.T @ (bank.network.first.T @ q).relu()
        h = (bank.network.mix.T @ torch.cat([c, bank.layer])).relu()
        down, down_bias, up, up_bias = (torch.einsum("h,h...->...", h, head) for head in bank.network.heads)
        expected = (x[t] @ down + down_bias).relu() @ up + up_bias
        expected = expected + sum(p[t, e] / p[t, best].sum() * one(bank.inner, e, x[t]) for e in best)
        assert_close(y[t], expected)


def test_hypermoe_tokens_of_equal_choices_share_the_adapter():
    moe = layer("hypermoe", top_k=1).eval()
    for head in moe.experts.network.heads:
        head.data.normal_()
    moe.experts.inner.down.data.zero_()
    x = tokens(1).expand(4, 5) * torch.tensor([[1.0], [1.0], [2.0], [1.0]], dtype=torch.float64)
    y = moe(x)
    assert torch.equal(moe.route(x).notes["choice"], moe.route(x).notes["choice"][:1].expand(4, 1))
    assert_close(y[0], y[1])
    assert not torch.allclose(y[0], y[2]), "the adapter is one, its input is not"


def test_hypermoe_all_experts_chosen_leave_a_constant_adapter():
    moe, x = layer("hypermoe", top_k=4).eval(), tokens(3)
    for head in moe.experts.network.heads:
        head.data.normal_()
    before = moe(x)
    moe.experts.embedding.data.normal_()
    assert_close(moe(x), before, msg="q = 0 whatever the embeddings")


def test_hypermoe_adapter_is_near_zero_at_the_start_and_skips_tokens_without_expert():
    moe, x = layer("hypermoe", lively=False).eval(), tokens(6)
    assert isinstance(moe.experts, HyperExperts)
    plain = moe.experts.inner.run(x, moe.route(x).routing)
    extra = (moe(x) - plain).detach().abs().max()
    assert 0 < float(extra) < 0.02
    valid = torch.arange(6) != 2
    assert not moe(x, Context(valid=valid))[2].detach().any()
    assert set(moe.losses) == {"importance", "load"}
    with pytest.raises(ValueError, match="a hypernetwork needs a router that chooses experts"):
        moe.experts.run(x, layer("soft-moe").route(x).routing)
