"""Checks of the catalogue: routers that see more than the token (task-moe, uni-perceiver-moe ...)."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import moestro
from moestro.experts import ModuleExperts
from moestro.layers import MoE
from moestro.routers.centroids import NearestCentroid
from moestro.routing import Context


def layer(name, num_experts=4, **options):
    moe = moestro.build(name, width=5, hidden=3, num_experts=num_experts, activation="relu", **options).double()
    with torch.no_grad():
        for parameter in moe.router.parameters():
            parameter.normal_(0, 0.7)
    return moe


def tokens(count):
    return torch.randn(count, 5, dtype=torch.float64)


def one(moe, e, x):
    return (x @ moe.experts.up[e]).relu() @ moe.experts.down[e]


# task-moe


def test_task_moe_tokens_of_a_task_share_experts_and_weights():
    moe, x = layer("task-moe", num_domains=3), tokens(30)
    domain = torch.arange(30) % 3
    matrix = moe.route(x, Context(domain=domain)).routing.combine_matrix()
    for task in range(3):
        rows = matrix[domain == task]
        assert_close(rows, rows[:1].expand_as(rows))
        p = (moe.router.scorer.embedding[task] @ moe.router.scorer.scorer.weight.T).softmax(0)
        best = p.sort(descending=True, stable=True).indices[:2]
        expected = torch.zeros(4, dtype=torch.float64)
        expected[best] = p[best] / p[best].sum()
        assert_close(rows[0], expected)


def test_task_moe_two_experts_alone_give_the_task_its_output():
    moe, x = layer("task-moe", num_domains=3), tokens(7)
    context = Context(domain=torch.full((7,), 1))
    row = moe.route(x, context).routing.combine_matrix()[0]
    kept = row.nonzero().flatten().tolist()
    assert len(kept) == 2
    assert_close(moe(x, context), sum(row[e] * one(moe, e, x) for e in kept))


def test_task_moe_balance_counts_tokens_not_tasks():
    moe, x = layer("task-moe", num_domains=2), tokens(10)
    domain = torch.tensor([0] * 8 + [1] * 2)
    decision = moe.route(x, Context(domain=domain))
    p, first = decision.probs, decision.notes["choice"][:, 0]
    counts = [float((first == e).double().mean()) for e in range(4)]
    expected = 4 * sum(counts[e] * p[:, e].mean() for e in range(4))
    assert_close(moe.losses["balance"][1](decision), expected)


def test_task_moe_sees_a_sentence_or_a_token_instead():
    x, sequence = tokens(6), torch.tensor([0, 0, 0, 1, 1, 1])
    sentence = layer("task-moe", num_domains=1, see="sentence")
    logits = sentence.route(x, Context(sequence=sequence)).logits
    mean = torch.stack([x[:3].mean(0), x[3:].mean(0)]).repeat_interleave(3, 0)
    assert_close(logits, mean @ sentence.router.scorer.scorer.weight.T)
    assert not sentence.causal
    token = layer("task-moe", num_domains=1, see="token")
    assert_close(token.route(x).logits, x @ token.router.scorer.weight.T)
    with pytest.raises(ValueError, match="num_domains=3 has no effect on see='token'"):
        layer("task-moe", num_domains=3, see="token")
    with pytest.raises(ValueError, match=r"needs Context\.domain"):
        layer("task-moe", num_domains=3)(x)


# task-based-moe


def test_task_based_moe_equal_embeddings_are_a_plain_token_router():
    moe, x = layer("task-based-moe", num_domains=3, task_size=2), tokens(9)
    scorer, domain = moe.router.scorer, torch.arange(9) % 3
    weight = scorer.scorer.weight
    full = torch.cat([x, scorer.embedding[domain]], 1) @ weight.T
    assert_close(moe.route(x, Context(domain=domain)).logits, full)
    scorer.embedding.data[:] = scorer.embedding.data[0]
    alike = moe.route(x, Context(domain=domain)).logits
    assert_close(alike, x @ weight[:, :5].T + scorer.embedding[0] @ weight[:, 5:].T)
    assert_close(alike, moe.route(x, Context(domain=torch.zeros(9, dtype=torch.long))).logits)
    fresh = moestro.build("task-based-moe", width=5, hidden=3, num_experts=4, num_domains=3).router.scorer
    assert not fresh.embedding.any()


# uni-perceiver-moe


def bits(*names):
    return sum(1 << name for name in names)


def test_uni_perceiver_moe_tokens_of_equal_attributes_share_the_decision():
    moe, x = layer("uni-perceiver-moe").eval(), tokens(6)
    domain = torch.tensor([bits(0, 2), bits(1), bits(0, 2), bits(), bits(1), bits(0, 1, 2, 7)])
    decision = moe.route(x, Context(domain=domain))
    matrix, scorer = decision.routing.combine_matrix(), moe.router.scorer
    assert_close(matrix[0], matrix[2])
    assert_close(matrix[1], matrix[4])
    for t in range(6):
        m = torch.tensor([int(domain[t]) >> b & 1 for b in range(8)], dtype=torch.float64)
        v = scorer.embed.weight @ m + scorer.embed.bias
        v = (v - v.mean()) / (v.var(correction=0) + 1e-5).sqrt()
        z = scorer.scorer.weight @ v
        best = z.sort(descending=True, stable=True).indices[:2]
        assert_close(matrix[t, best], z[best].softmax(0))
    assert not moe.losses


def test_uni_perceiver_moe_merged_linear_experts_give_the_same_output():
    moe, x = layer("uni-perceiver-moe").eval(), tokens(5)
    linears = [nn.Linear(5, 5).double() for _ in range(4)]
    layer_of_linears = MoE(moe.router, ModuleExperts(linears, 5))
    context = Context(domain=torch.full((5,), bits(0, 3)))
    weights = moe.route(x, context).routing.combine_matrix()[0]
    merged = sum(a * linear.weight for a, linear in zip(weights, linears, strict=True))
    bias = sum(a * linear.bias for a, linear in zip(weights, linears, strict=True))
    assert_close(layer_of_linears(x, context), x @ merged.T + bias)


def test_uni_perceiver_moe_noise_is_for_training_and_single_choices_keep_their_weight():
    moe, x = layer("uni-perceiver-moe", noise=40.0), tokens(4)
    context = Context(domain=torch.zeros(4, dtype=torch.long))
    decisions = [moe.route(x, context) for _ in range(400)]
    spread = torch.stack([d.notes["noisy_logits"] - d.logits for d in decisions]).detach()
    assert_close(float(spread.std()), 10.0, rtol=0.1, atol=0)
    single = layer("uni-perceiver-moe", top_k=1).eval()
    decision = single.route(x, context)
    assert_close(decision.routing.combine_matrix().amax(1), decision.probs.amax(1))
    with pytest.raises(ValueError, match=r"Context\.domain holds 256 but"):
        moe(x, Context(domain=torch.full((4,), 256)))
    with pytest.raises(ValueError, match="num_attributes=0"):
        layer("uni-perceiver-moe", num_attributes=0)


# single-gate-revisit


def test_single_gate_revisit_is_an_ensemble_of_base_and_one_expert_per_image():
    moe, x = layer("single-gate-revisit"), tokens(8)
    sequence = torch.arange(8) // 4
    y = moe(x, Context(sequence=sequence))
    centre = moe.router.router.scorer.scorer.centre
    for n in range(2):
        image = x[sequence == n]
        p = (-(image.mean(0) - centre).square().sum(1)).softmax(0)
        e = int(p.argmax())
        assert_close(y[sequence == n], p[e] * one(moe, e, image) + (1 - p[e]) * moe.shared(image))


def test_single_gate_revisit_experts_equal_to_the_base_give_the_base():
    moe, x = layer("single-gate-revisit"), tokens(6)
    with torch.no_grad():
        moe.experts.up.copy_(moe.shared.up.expand_as(moe.experts.up))
        moe.experts.down.copy_(moe.shared.down.expand_as(moe.experts.down))
    assert_close(moe(x), moe.shared(x))
    moe.router.router.scorer.scorer.centre.data.zero_()  # a uniform gate
    assert_close(moe(x), moe.shared(x))


def test_single_gate_revisit_centres_start_at_clusters():
    gate = NearestCentroid(2, 3).double()
    corner = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]], dtype=torch.float64)
    rows = corner.repeat(20, 1) + 0.1 * torch.randn(60, 2, dtype=torch.float64)
    gate.fit(rows)
    nearest = torch.cdist(corner, gate.centre.detach()).min(1)
    assert sorted(nearest.indices.tolist()) == [0, 1, 2]
    assert float(nearest.values.max()) < 0.2
    cluster = torch.arange(60) % 3
    assert torch.equal(gate(rows).argmax(1), nearest.indices[cluster])
    with pytest.raises(ValueError, match="2 rows cannot make 3 clusters"):
        gate.fit(rows[:2])
    with pytest.raises(ValueError, match="sharpness=0"):
        NearestCentroid(2, 3, 0)
