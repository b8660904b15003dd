"""Language models of the catalogue: each check of an entry, and each routing against a slow one in float64."""

import math

import pytest
import torch
from oracles.entry import entry
from oracles.routes import best, counts_times_probability, lively, same_routing, share, tokens
from torch.testing import assert_close

import moestro
from moestro.layers import DenseMoEBlock
from moestro.routing import Context


def z_loss(logits):
    return sum(torch.exp(z).sum().log() ** 2 for z in logits) / len(logits)


def slow_softmax_router(name, k, weigh, conventions, scorer="scorer.weight"):
    """Softmax over all, k best, `weigh` of the chosen probabilities; losses by convention."""

    def slow(x, p):
        logits = [x[t] @ p[scorer].T for t in range(len(x))]
        probs = [share(z) for z in logits]
        chosen = [best(q, k) for q in probs]
        rows = [
            dict(zip(c, weigh(torch.stack([q[i] for i in c])), strict=True))
            for c, q in zip(chosen, probs, strict=True)
        ]
        counts = {
            "megatron": lambda: counts_times_probability(probs, chosen, k * len(x)),
            "transformers": lambda: counts_times_probability(probs, chosen, len(x)),
            "z": lambda: z_loss(logits),
        }
        return rows, {loss: counts[how]() for loss, how in conventions.items()}

    return slow


RAW = {
    "olmoe": {"balance": "megatron", "z": "z"},
    "jamba": {"balance": "transformers"},
    "grok1": {},
    "qwen-moe": {"balance": "transformers"},
}


@pytest.mark.parametrize("method", RAW)
def test_raw_probabilities_weigh(method):
    moe = lively(method, top_k=3)
    decision = same_routing(moe, slow_softmax_router(method, 3, lambda p: p, RAW[method]))
    assert bool((decision.routing.combine_matrix().sum(1) < 1).all())


@entry("qwen3", "dbrx")
def test_weights_are_normalised_to_one(method):
    moe = lively(method, top_k=3)
    decision = same_routing(moe, slow_softmax_router(method, 3, lambda p: p / p.sum(), {"balance": "megatron"}))
    assert_close(decision.routing.combine_matrix().sum(1), torch.ones(12, dtype=torch.float64))


@entry("arctic")
def test_arctic_is_mixtral_without_a_capacity(method):
    slow = slow_softmax_router(method, 2, lambda p: p / p.sum(), {"balance": "transformers"})
    same_routing(lively(method), slow)


# ---- dbrx


@entry("dbrx")
def test_dbrx_norm_one_is_mixtral_with_four_choices(method):
    moe, mixtral = lively(method), lively("mixtral", top_k=4)
    x = tokens()
    assert_close(moe.route(x).routing.combine_matrix(), mixtral.route(x).routing.combine_matrix())


@entry("dbrx")
def test_dbrx_norm_two_makes_squares_sum_to_one(method):
    matrix = lively(method, norm=2.0).route(tokens()).routing.combine_matrix()
    assert_close(matrix.square().sum(1), torch.ones(12, dtype=torch.float64))
    raw = lively(method, norm=None).route(tokens())
    assert_close(raw.routing.combine_matrix().sum(1), raw.probs.topk(4).values.sum(1))


@entry("dbrx")
def test_dbrx_refuses_a_norm_of_zero(method):
    with pytest.raises(ValueError, match=r"norm=0\.0 must be above 0"):
        lively(method, norm=0.0)


@entry("dbrx")
def test_dbrx_jitters_the_router_only_in_training(method):
    moe, x = lively(method, jitter=0.3), tokens()
    assert not torch.equal(moe.train().route(x).logits, moe.eval().route(x).logits)


# ---- grok1


@entry("grok1")
def test_grok1_starts_with_equal_weights_for_the_first_experts(method):
    moe = moestro.build(method, width=6, hidden=3, num_experts=8)
    matrix = moe.route(torch.randn(5, 6)).routing.combine_matrix()
    assert_close(matrix, torch.tensor([0.125, 0.125, 0, 0, 0, 0, 0, 0]).expand(5, 8))


# ---- qwen-moe


@entry("qwen-moe")
def test_qwen_moe_gate_starts_at_one_half_and_scales_the_shared_expert(method):
    moe = lively(method, top_k=2, shared_experts=2)
    x = tokens()
    gate = 1 / (1 + torch.exp(-(x @ moe.shared.weight)))
    routed = moe.experts.run(x, moe.route(x).routing)
    assert_close(moe(x), routed + gate * moe.shared.inner(x))
    torch.nn.init.zeros_(moe.shared.weight)
    assert_close(moe(x), routed + 0.5 * moe.shared.inner(x))
    assert moe.shared.inner.hidden == 2 * moe.experts.hidden


@entry("qwen-moe")
def test_qwen_moe_needs_a_shared_expert(method):
    with pytest.raises(ValueError, match="shared_experts=0 must be at least 1"):
        lively(method, shared_experts=0)


# ---- olmoe


def around(layers, width, heads_width, kv_width, vocab, norms_per_layer, embeddings=2):
    attention = 2 * width * heads_width + 2 * width * kv_width
    return layers * (attention + norms_per_layer) + width + embeddings * vocab * width


def layer_counts(method, **sizes):
    with torch.device("meta"):
        return moestro.build(method, **sizes).parameter_counts()


@entry("olmoe")
def test_olmoe_has_the_published_number_of_parameters(method):
    counts = layer_counts(method, width=2048, hidden=1024, num_experts=64)
    rest = around(16, 2048, 2048, 2048, 50304, 2 * 2048 + 2 * 2048)
    assert round((16 * counts.total + rest) / 1e9, 1) == 6.9
    assert round((16 * counts.active + rest) / 1e9, 1) == 1.3


@entry("jamba")
def test_jamba_has_the_published_number_of_parameters(method):
    """52 billion in all: 16 mixtures of 16 experts, 16 dense layers, 4 attention and 28 Mamba layers."""
    counts = layer_counts(method, width=4096, hidden=14336, num_experts=16)
    dense = 16 * 3 * 4096 * 14336
    attention = 4 * (2 * 4096 * 4096 + 2 * 4096 * 1024)
    inner, state, rank = 8192, 16, 256
    mamba = 28 * (
        4096 * 2 * inner + 5 * inner + inner * (rank + 2 * state) + rank * inner + inner * 18 + inner * 4096
    )
    rest = dense + attention + mamba + 2 * 65536 * 4096
    assert round((16 * counts.total + rest) / 1e9) == 52
    assert round((16 * counts.active + rest) / 1e9) == 12


# ---- st-moe


@entry("st-moe")
def test_st_moe_z_loss_is_the_squared_log_of_experts_at_zero_and_shifts(method):
    moe = lively(method)
    torch.nn.init.zeros_(moe.router.scorer.scorer.weight)
    decision = moe.route(tokens())
    loss = moe.losses["z"][1]
    assert_close(loss(decision), torch.tensor(math.log(8) ** 2, dtype=torch.float64))
    shifted = type(decision)(decision.routing, decision.logits + 3.0, decision.probs, decision.notes)
    assert_close(loss(shifted), torch.tensor((3 + math.log(8)) ** 2, dtype=torch.float64))


@entry("st-moe")
def test_st_moe_z_loss_leaves_padding_out(method):
    moe, x, valid = lively(method).eval(), tokens(), torch.arange(12) % 3 > 0
    loss = moe.losses["z"][1]
    assert_close(loss(moe.route(x, Context(valid=valid))), loss(moe.route(x[valid])))


@entry("st-moe")
def test_st_moe_routes_and_loses_by_its_equations(method):
    """Evaluation, where the second choice always stays; capacity int(2 T / E) = 3 after a minimum of 1."""

    def slow(x, p):
        logits = [x[t] @ p["scorer.scorer.weight"].T for t in range(len(x))]
        probs = [share(z) for z in logits]
        chosen, used, rows = [best(q, 2) for q in probs], [0] * 8, [{} for _ in x]
        for rank in range(2):
            for t in range(len(x)):
                e = chosen[t][rank]
                if used[e] < 3:
                    rows[t][e] = probs[t][e] / (probs[t][chosen[t][0]] + probs[t][chosen[t][1]] + 1e-9)
                    used[e] += 1
        first = [c[:1] for c in chosen]
        return rows, {"balance": counts_times_probability(probs, first, len(x)), "z": z_loss(logits)}

    decision = same_routing(lively(method, min_capacity=1).eval(), slow)
    assert not decision.notes["kept"].all()


@entry("st-moe")
def test_st_moe_keeps_a_second_choice_above_the_threshold(method):
    moe = lively(method, threshold=0.2, capacity_factor=None, jitter=0.0).train()
    x = tokens(6000)
    torch.manual_seed(0)
    decision = moe.route(x)
    pair = decision.probs.detach().topk(2).values
    second = pair[:, 1] / pair.sum(1)
    kept = decision.notes["kept"][:, 1]
    assert kept[second > 0.2].all()
    rest = second < 0.2
    assert abs(float(kept[rest].double().mean() - (second[rest] / 0.2).mean())) < 0.05


# ---- gpt-oss


@entry("gpt-oss")
def test_gpt_oss_bias_selects_and_weighs(method):
    def slow(x, p):
        logits = [x[t] @ p["scorer.scorer.weight"].T + p["scorer.bias"] for t in range(len(x))]
        chosen = [best(z, 4) for z in logits]
        rows = [
            dict(zip(c, share(torch.stack([z[i] for i in c])), strict=True))
            for c, z in zip(chosen, logits, strict=True)
        ]
        probs = [share(z) for z in logits]
        return rows, {"balance": counts_times_probability(probs, chosen, 4 * len(x))}

    same_routing(lively(method), slow)


@entry("gpt-oss")
def test_gpt_oss_agrees_with_transformers(method):
    modeling = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    moe = lively(method, num_experts=6, top_k=2)

    class Config:
        num_experts_per_tok, num_local_experts, hidden_size = 2, 6, 6

    theirs = modeling.GptOssTopKRouter(Config()).double()
    with torch.no_grad():
        theirs.weight.copy_(moe.router.scorer.scorer.weight)
        theirs.bias.copy_(moe.router.scorer.bias)
    x = tokens()
    weight, index = theirs(x)[-2:]
    expected = torch.zeros(12, 6, dtype=torch.float64).scatter(1, index, weight)
    assert_close(moe.route(x).routing.combine_matrix(), expected)


# ---- llama4


@entry("llama4")
def test_llama4_weighs_what_goes_into_the_expert(method):
    moe, x = lively(method), tokens()
    z = x @ moe.router.router.scorer.weight.T
    for t in range(12):
        e = best(z[t], 1)[0]
        offsets = torch.tensor([0] * (e + 1) + [1] * (8 - e))
        row = x[t : t + 1] / (1 + torch.exp(-z[t, e]))
        assert_close(moe(x)[t : t + 1], moe.experts(row, offsets) + moe.shared(x[t : t + 1]))


@entry("llama4")
def test_llama4_balance_is_that_of_softmax_probabilities(method):
    moe, x = lively(method), tokens()
    probs = [share(z) for z in x @ moe.router.router.scorer.weight.T]
    expected = counts_times_probability(probs, [best(p, 1) for p in probs], 12)
    assert_close(moe.losses["balance"][1](moe.route(x)), expected)


# ---- deepseekmoe


@entry("deepseekmoe")
def test_deepseekmoe_routes_and_loses_by_its_equations(method):
    def slow(x, p):
        probs = [share(x[t] @ p["scorer.weight"].T) for t in range(len(x))]
        chosen = [best(q, 3) for q in probs]
        rows = [{i: q[i] for i in c} for c, q in zip(chosen, probs, strict=True)]
        device = torch.zeros((), dtype=torch.float64)
        for d in range(4):
            mine = [2 * d, 2 * d + 1]
            f = sum(8 / (3 * len(x)) * sum(c.count(i) for c in chosen) for i in mine) / 2
            device = device + f * sum(sum(q[i] for q in probs) / len(x) for i in mine)
        balance = counts_times_probability(probs, chosen, 3 * len(x))
        return rows, {"balance": balance, "device_balance": device}

    same_routing(lively(method, top_k=3, num_devices=4, device_balance=0.05), slow)


@entry("deepseekmoe")
def test_deepseekmoe_device_loss_at_its_ends(method):
    """One expert per device: the expert loss. One device: constant 1 without a gradient."""
    from moestro.balance import GroupBalance

    moe = lively(method, top_k=3, num_devices=8, device_balance=0.05)
    decision = moe.route(tokens())
    assert_close(moe.losses["device_balance"][1](decision), moe.losses["balance"][1](decision))
    constant = GroupBalance(1)(decision)
    assert_close(constant, torch.ones((), dtype=torch.float64))
    (gradient,) = torch.autograd.grad(constant, moe.router.scorer.weight)
    assert float(gradient.abs().max()) < 1e-15
    with pytest.raises(ValueError, match="constant and cannot act"):
        lively(method, device_balance=0.05)
    with pytest.raises(ValueError, match="num_groups=3 does not divide 8 experts"):
        lively(method, num_devices=3)


@entry("deepseekmoe")
def test_deepseekmoe_shared_experts_have_no_gate(method):
    moe, x = lively(method, top_k=2, shared_experts=2), tokens()
    assert_close(moe(x), moe.experts.run(x, moe.route(x).routing) + moe.shared(x))
    assert moe.shared.hidden == 2 * moe.experts.hidden


# ---- arctic


def arctic_block(seed=0):
    torch.manual_seed(seed)
    moe = lively("arctic", num_experts=4)
    dense, attention = torch.nn.Linear(6, 6).double(), torch.nn.Linear(6, 6).double()
    return DenseMoEBlock(attention, dense, moe, lambda: torch.nn.LayerNorm(6).double())


@entry("arctic")
def test_arctic_block_without_experts_is_a_dense_transformer_block(method):
    block, x = arctic_block(), tokens().view(2, 6, 6)
    torch.nn.init.zeros_(block.moe.experts.down)
    h = x + block.attention(block.attention_norm(x))
    assert_close(block(x), h + block.dense(block.dense_norm(h)))


@entry("arctic")
def test_arctic_mixture_reads_what_attention_reads(method):
    block, x = arctic_block(), tokens().view(2, 6, 6)
    seen = []
    block.moe.register_forward_hook(lambda module, given, y: seen.append(y))
    block(x)
    torch.nn.init.normal_(block.attention.weight)
    block(x)
    assert torch.equal(*seen)


@entry("arctic")
def test_arctic_drops_in_training_only(method):
    moe = lively(method, capacity_factor=0.25)
    x = tokens(16)
    assert int(moe.train().route(x).routing.load().max()) <= 1
    assert int(moe.eval().route(x).routing.load().sum()) == 32
    assert not moe.causal
    assert moe.causal_evaluation


# ---- qwen3


@entry("qwen3", "global-batch-balance")
def test_one_process_balances_its_own_batch(method):
    from moestro.balance import GlobalBatchBalance, LoadTimesProbability

    decision = lively("qwen3", top_k=3).route(tokens(), Context(valid=torch.arange(12) % 4 > 0))
    assert_close(GlobalBatchBalance()(decision), LoadTimesProbability("megatron")(decision))
