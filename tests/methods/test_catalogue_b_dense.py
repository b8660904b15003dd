"""Checks of the catalogue: all experts run, gates weight them (dense-softmax to evomoe-dts)."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import moestro
from moestro.balance import RoutingLog
from moestro.balance.information import token_information
from moestro.balance.likelihood import competitive_loss, cooperative_loss, responsibilities, task_weights
from moestro.balance.localised import LocalisedBalance
from moestro.balance.reconstruction import Reconstruction
from moestro.balance.steps import CountSteps
from moestro.experts import ModuleExperts
from moestro.layers import MoE
from moestro.routers import Linear, TokenChoice, TopK, softmax, softmax_over_selected
from moestro.routers.autoencoders import relatedness
from moestro.routers.dense import Above
from moestro.routers.dense_to_sparse import CosineTemperature
from moestro.routers.gate_networks import Densities, Tree, TwoLayer
from moestro.routing import Context


def layer(name, num_experts=4, **options):
    moe = moestro.build(name, width=5, hidden=3, num_experts=num_experts, activation="relu", **options).double()
    with torch.no_grad():
        for parameter in moe.router.parameters():
            parameter.normal_(0, 0.5)
    return moe


def tokens(count):
    return torch.randn(count, 5, dtype=torch.float64)


def outputs(moe, x):
    """Every expert on every token, `[tokens, experts, width]`."""
    each = [(x @ up).relu() @ down for up, down in zip(moe.experts.up, moe.experts.down, strict=True)]
    return torch.stack(each, 1)


# dense-softmax


def test_a_tree_of_three_levels_multiplies_along_each_path():
    scorer, x = Tree(5, (2, 3, 2)).double(), tokens(4)
    for parameter in scorer.parameters():
        parameter.data.normal_()
    gates = [
        level(x).unflatten(1, (-1, num)).softmax(2) for level, num in zip(scorer.levels, (2, 3, 2), strict=True)
    ]
    got = scorer(x).softmax(1)
    for leaf in range(12):
        a, b, c = leaf // 6, leaf // 2 % 3, leaf % 2
        assert_close(got[:, leaf], gates[0][:, 0, a] * gates[1][:, a, b] * gates[2][:, 3 * a + b, c])


def test_dense_softmax_weighs_all_experts():
    moe, x = layer("dense-softmax"), tokens(6)
    gate = (x @ moe.router.scorer.weight.T + moe.router.scorer.bias).softmax(1)
    assert_close(moe(x), torch.einsum("te,tew->tw", gate, outputs(moe, x)))


def test_dense_softmax_equals_any_top_k_router_of_all_experts():
    dense, x = layer("dense-softmax"), tokens(6)
    scorer = Linear(5, 4).double()
    scorer.weight.data.copy_(dense.router.scorer.weight)
    dense.router.scorer.bias.data.zero_()
    sparse = MoE(TokenChoice(scorer, TopK(4), softmax, softmax_over_selected), dense.experts)
    assert_close(sparse(x), dense(x))


def test_dense_softmax_tree_is_the_product_of_its_gates():
    moe, x = layer("dense-softmax", 6, branches=2), tokens(5)
    scorer = moe.router.scorer
    root, leaf = scorer.levels
    top = (x @ root.weight.T + root.bias).softmax(1)
    leaves = x @ leaf.weight.T + leaf.bias
    expected = torch.cat([top[:, :1] * leaves[:, :3].softmax(1), top[:, 1:] * leaves[:, 3:].softmax(1)], 1)
    assert_close(moe.route(x).probs, expected)
    with pytest.raises(ValueError, match="branches=4 does not divide 6 experts"):
        layer("dense-softmax", 6, branches=4)
    with pytest.raises(ValueError, match="branching=\\(2, 0\\) needs a level, and a child"):
        Tree(5, (2, 0))
    with pytest.raises(ValueError, match="branches=2 has no effect on gate='densities'"):
        layer("dense-softmax", gate="densities", branches=2)


def test_dense_softmax_densities_are_gaussian_posteriors():
    scorer, x = Densities(3, 2).double(), torch.randn(4, 3, dtype=torch.float64)
    for parameter in scorer.parameters():
        parameter.data.normal_()
    logits = scorer(x)
    for e in range(2):
        lower = scorer.factor[e].tril(-1) + torch.diag(scorer.factor[e].diagonal().exp())
        normal = torch.distributions.MultivariateNormal(scorer.mean[e], precision_matrix=lower.T @ lower)
        assert_close(logits[:, e], scorer.log_alpha[e] + normal.log_prob(x))


def test_dense_softmax_competitive_gradients_are_responsibilities():
    logits = torch.randn(1, 3, dtype=torch.float64, requires_grad=True)
    prediction = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)
    target = torch.randn(1, 2, dtype=torch.float64)
    log_weight = logits.log_softmax(1)
    density = torch.stack([(-0.5 * (target[0] - f).square().sum()).exp() for f in prediction[0]])
    joint = log_weight.exp()[0] * density
    h = responsibilities(log_weight, prediction, target)
    assert_close(h[0], joint / joint.sum())
    loss = competitive_loss(log_weight, prediction, target)
    assert_close(loss, -joint.sum().log())
    by_gate, by_expert = torch.autograd.grad(loss, (logits, prediction))
    assert_close(by_gate, log_weight.exp() - h)
    assert_close(by_expert, -h.unsqueeze(-1) * (target.unsqueeze(1) - prediction))


def test_dense_softmax_losses_agree_for_one_expert():
    prediction, target = torch.randn(5, 1, 2), torch.randn(5, 2)
    one = torch.ones(5, 1)
    assert_close(competitive_loss(one.log(), prediction, target), cooperative_loss(one, prediction, target) / 2)


def test_dense_softmax_em_never_loses_likelihood():
    x, target = torch.randn(60, 1, dtype=torch.float64), torch.randn(60, 1, dtype=torch.float64)
    log_weight = torch.full((60, 2), 0.5, dtype=torch.float64).log()
    slopes, last = torch.tensor([1.0, -1.0], dtype=torch.float64), math.inf
    for _ in range(15):
        prediction = x.unsqueeze(1) * slopes.view(1, 2, 1)
        loss = float(competitive_loss(log_weight, prediction, target))
        assert loss <= last + 1e-12
        last, h = loss, responsibilities(log_weight, prediction, target)
        assert_close(h.sum(1), torch.ones(60, dtype=torch.float64))
        slopes = (h * x * target).sum(0) / (h * x * x).sum(0)  # weighted least squares
        log_weight = h.mean(0).log().expand(60, 2)


# mmoe-ple


def test_mmoe_ple_each_task_has_its_gate():
    moe, x, task = layer("mmoe-ple", num_domains=3), tokens(7), torch.tensor([0, 2, 1, 1, 0, 2, 2])
    y = moe(x, Context(domain=task))
    every = outputs(moe, x)
    for t in range(7):
        gate = (moe.router.scorer.weight[task[t]] @ x[t]).softmax(0)
        assert_close(y[t], gate @ every[t])


def test_mmoe_ple_one_task_or_equal_gates_are_one_gate():
    moe, x = layer("mmoe-ple", num_domains=2), tokens(5)
    moe.router.scorer.weight.data[1] = moe.router.scorer.weight.data[0]
    gate = (x @ moe.router.scorer.weight[0].T).softmax(1)
    single = torch.einsum("te,tew->tw", gate, outputs(moe, x))
    for task in range(2):
        assert_close(moe(x, Context(domain=torch.full((5,), task))), single)


def test_mmoe_ple_own_experts_serve_their_task_and_the_shared_branch_sees_all():
    moe, x = layer("mmoe-ple", 5, num_domains=2, own_experts=2), tokens(6)
    pools = [[0, 1, 4], [2, 3, 4], [0, 1, 2, 3, 4]]
    for task, pool in enumerate(pools):
        context = Context(domain=torch.full((6,), task))
        decision = moe.route(x, context)
        assert (decision.routing.load() > 0).nonzero().flatten().tolist() == pool
        gate = (x @ moe.router.scorer.weight[task][pool].T).softmax(1)
        assert_close(moe(x, context), torch.einsum("te,tew->tw", gate, outputs(moe, x)[:, pool]))
    moe(x, Context(domain=torch.zeros(6, dtype=torch.long))).sum().backward()
    assert moe.router.scorer.weight.grad.isfinite().all()


def test_mmoe_ple_without_own_experts_is_mmoe_and_refuses_too_many():
    shape = layer("mmoe-ple", num_domains=3).router.scorer.weight.shape
    assert shape == (3, 4, 5)
    with pytest.raises(ValueError, match="3 tasks with own_experts=2 need 6 experts but there are 4"):
        layer("mmoe-ple", num_domains=3, own_experts=2)
    assert_close(task_weights([1.0, 2.0], [0.5, 1.0], 3), [0.125, 2.0])


# ds-moe


def test_ds_moe_trains_dense_and_all_experts_learn():
    moe, x = layer("ds-moe", top_k=2), tokens(6)
    scores = (x @ moe.router.scorer.weight.T).softmax(1)
    assert_close(moe(x), torch.einsum("te,tew->tw", scores, outputs(moe, x)))
    moe(x).sum().backward()
    assert moe.experts.up.grad.flatten(1).any(1).all()


def test_ds_moe_all_experts_at_inference_reproduce_training():
    moe, x = layer("ds-moe", top_k=4), tokens(6)
    assert_close(moe.eval()(x), moe.train()(x))


def test_ds_moe_inference_keeps_the_best_or_those_above_a_threshold_unnormalised():
    moe, x = layer("ds-moe", top_k=2).eval(), tokens(9)
    scores = (x @ moe.router.scorer.weight.T).softmax(1)
    expected = scores * (scores >= scores.sort(1).values[:, -2:-1])
    assert_close(moe.route(x).routing.combine_matrix(), expected)
    cut = layer("ds-moe", top_k=None, threshold=0.3).eval()
    scores = (x @ cut.router.scorer.weight.T).softmax(1)
    assert_close(cut.route(x).routing.combine_matrix(), scores * (scores > 0.3))
    with pytest.raises(ValueError, match="choose one of top_k and threshold"):
        layer("ds-moe", top_k=2, threshold=0.1)


def test_ds_moe_has_the_parameters_of_a_dense_layer_and_a_router():
    counts = layer("ds-moe", top_k=2).parameter_counts()
    assert counts.total == 4 * (5 * 3 + 3 * 5) + 4 * 5


def information(probs, valid=None):
    class Fixed(nn.Module):
        pass

    moe = layer("ds-moe", probs.shape[1], top_k=1)
    decision = moe.route(torch.zeros(len(probs), 5, dtype=torch.float64), Context(valid=valid))
    object.__setattr__(decision, "probs", probs)
    return float(token_information(decision))


def test_ds_moe_information_is_between_minus_log_experts_and_zero():
    one_hot = torch.eye(4, dtype=torch.float64).repeat(2, 1)
    assert_close(information(one_hot), -math.log(4))
    constant = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64).expand(6, 4)
    assert_close(information(constant), 0.0, atol=1e-12, rtol=0)
    probs = torch.rand(7, 4, dtype=torch.float64)
    probs = probs / probs.sum(1, keepdim=True)
    rows = [sum(-p * math.log(p) for p in row) for row in probs.tolist()]
    mean = [sum(column) / 7 for column in zip(*probs.tolist(), strict=True)]
    assert_close(information(probs), sum(rows) / 7 + sum(p * math.log(p) for p in mean))
    padded = torch.cat([probs, probs[:2]])
    assert_close(information(padded, torch.arange(9) < 7), information(probs))


def test_ds_moe_above_keeps_nobody_when_nobody_is():
    assert not Above(3, 0.9)(torch.full((2, 3), 0.5)).keep.any()


# evomoe-dts


def evomoe(steps=100, **options):
    return layer("evomoe-dts", dense_steps=steps, **options)


def test_evomoe_dts_hot_gate_is_uniform_and_serves_all():
    moe, x = evomoe(threshold=0.0, first_temperature=1e6, last_temperature=1e6), tokens(5)
    matrix = moe.route(x).routing.combine_matrix()
    assert_close(matrix, torch.full((5, 4), 0.25, dtype=torch.float64), atol=1e-4, rtol=0)


def test_evomoe_dts_cold_gate_samples_one_expert_by_its_probability():
    moe, x = evomoe(first_temperature=1e-4, last_temperature=1e-4), tokens(1).expand(4000, 5)
    decision = moe.route(x)
    matrix = decision.routing.combine_matrix()
    assert float(((matrix - matrix.round()).abs() > 1e-3).double().mean()) < 0.01
    assert_close(matrix.mean(0), decision.probs[0], atol=0.03, rtol=0)


def test_evomoe_dts_weights_are_the_gumbel_softmax_cut_at_the_threshold():
    moe, x = evomoe(threshold=0.2, first_temperature=0.7, last_temperature=0.7), tokens(6)
    torch.manual_seed(3)
    matrix = moe.route(x).routing.combine_matrix()
    torch.manual_seed(3)
    logits = x @ moe.router.scorer.weight.T
    gumbel = -torch.empty_like(logits).exponential_().log()
    a = ((logits + gumbel) / 0.7).softmax(1)  # log softmax only shifts
    assert_close(matrix, a * (a > 0.2))
    assert (matrix.sum(1) < 1).any()


def test_evomoe_dts_serves_at_most_one_over_threshold_and_fewer_as_it_cools():
    x, served = tokens(400), []
    for temperature in (2.0, 0.7, 0.3):
        at = {"first_temperature": temperature, "last_temperature": temperature}
        served.append(float(layer("evomoe-dts", 8, **at).route(x).notes["kept"].sum(1).double().mean()))
        assert int(layer("evomoe-dts", 8, threshold=0.2, **at).route(x).notes["kept"].sum(1).max()) <= 5
    assert served[0] > served[1] > served[2]


def test_evomoe_dts_temperature_falls_by_a_cosine_then_the_gate_is_top_1():
    schedule = CosineTemperature(2.0, 0.3, 10)
    assert_close([schedule(0), schedule(5), schedule(10), schedule(99)], [2.0, 1.15, 0.3, 0.3])
    moe, x = evomoe(steps=2), tokens(6)
    log = RoutingLog(moe)
    for dense in (True, True, False):
        with log.recording():
            moe(x)
        decision = log.decisions[log.layers[0]][0]
        assert (decision.notes["choice"].shape[1] == 4) == dense
        assert bool(log.auxiliary_loss() > 0) != dense
        log.update_controllers()
    assert int(moe.router.step) == 3
    best = (x @ moe.router.scorer.weight.T).softmax(1)
    expected = best * (best == best.max(1, keepdim=True).values)
    assert_close(moe.route(x).routing.combine_matrix(), expected)
    assert_close(evomoe().eval().route(x).notes["choice"].shape, torch.Size([6, 1]))


def test_evomoe_dts_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="temperatures and steps must be above 0"):
        evomoe(last_temperature=0.0)
    with pytest.raises(ValueError, match=r"threshold=1\.0 must be at least 0 and below 1"):
        evomoe(threshold=1.0)
    with pytest.raises(ValueError, match="has no `step` to count"):
        CountSteps().update(layer("loramoe"), torch.zeros(4))


# mov-molora


def test_mov_molora_one_expert_has_weight_one():
    moe, x = layer("mov-molora", 1), tokens(4)
    assert_close(moe.route(x).routing.combine_matrix(), torch.ones(4, 1, dtype=torch.float64))


def test_mov_molora_vectors_mix_alike_before_and_after_and_start_as_the_base_model():
    class Vector(nn.Module):
        def __init__(self):
            super().__init__()
            self.vector = nn.Parameter(torch.ones(5, dtype=torch.float64))

        def forward(self, rows):
            return rows * self.vector

    moe, keys = layer("mov-molora", 3), tokens(6)
    router, experts = moe.router, ModuleExperts([Vector() for _ in range(3)], 5)
    assert_close(MoE(router, experts)(keys), keys), "unchanged at the start"
    for expert in experts.experts:
        expert.vector.data.normal_()
    p = (keys @ router.scorer.scorer.weight.T + router.scorer.scorer.bias).softmax(1)
    merged = p @ torch.stack([expert.vector for expert in experts.experts])
    assert_close(MoE(router, experts)(keys), merged * keys)


def test_mov_molora_mask_keeps_raw_weights_and_jitter_is_for_training():
    moe, x = layer("mov-molora", top_k=2), tokens(6)
    p = (x @ moe.router.scorer.scorer.weight.T + moe.router.scorer.scorer.bias).softmax(1)
    assert_close(moe.route(x).routing.combine_matrix(), p * (p >= p.sort(1).values[:, -2:-1]))
    noisy = layer("mov-molora", jitter=0.5)
    assert not torch.equal(noisy(x), noisy(x))
    assert torch.equal(noisy.eval()(x), noisy(x))
    assert not noisy.losses


# loramoe


def localised(moe, x, context, delta):
    decision = moe.route(x, context)
    return LocalisedBalance(delta)(decision), decision.probs


def test_loramoe_loss_follows_its_equations():
    moe, x = layer("loramoe"), tokens(9)
    sequence, kind = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2]), torch.tensor([1, 1, 1, 0, 0, 0, 1, 1, 1])
    valid = torch.arange(9) != 5
    loss, probs = localised(moe, x, Context(sequence=sequence, domain=kind, valid=valid), 0.3)
    z = []
    for n, type_of_sample in enumerate((1, 0, 1)):
        for e in range(4):
            load = sum(probs[t, e] for t in range(9) if sequence[t] == n and valid[t])
            z.append((1.3 if (e < 2) == (type_of_sample == 1) else 0.7) * load)
    mean = sum(z) / 12
    expected = sum((value - mean) ** 2 for value in z) / 11 / (mean**2 + 1e-10)
    assert_close(loss, expected)


def test_loramoe_without_delta_is_the_plain_variation():
    moe, x = layer("loramoe"), tokens(6)
    loss, probs = localised(moe, x, Context(domain=torch.ones(6, dtype=torch.long)), 0.0)
    load = probs.sum(0)
    assert_close(loss, load.var() / load.mean() ** 2)


@pytest.mark.parametrize("delta", [0.4, -0.4])
def test_loramoe_at_the_optimum_matching_experts_carry_less_unless_delta_is_negative(delta):
    moe, x = layer("loramoe"), torch.ones(8, 5, dtype=torch.float64)
    context = Context(domain=torch.ones(8, dtype=torch.long))
    optimiser = torch.optim.Adam(moe.router.parameters(), 0.05)
    for _ in range(300):
        optimiser.zero_grad()
        loss, probs = localised(moe, x, context, delta)
        loss.backward()
        optimiser.step()
    first, second = probs[0, :2].sum(), probs[0, 2:].sum()
    assert_close(float((first / second).detach()), (1 - delta) / (1 + delta), rtol=0.02, atol=0)


def test_loramoe_zero_adapters_leave_the_base_model_and_labels_are_needed():
    moe, x = layer("loramoe"), tokens(4)
    moe.experts.down.data.zero_()
    assert not moe(x, Context(domain=torch.zeros(4, dtype=torch.long))).detach().any()
    with pytest.raises(ValueError, match=r"needs each sample's type, 0 or 1: call the layer with Context\(domain"):
        LocalisedBalance()(moe.route(x))
    with pytest.raises(ValueError, match="knows the types 0 and 1, got 2"):
        LocalisedBalance()(moe.route(x, Context(domain=torch.full((4,), 2))))
    with pytest.raises(ValueError, match="delta=1"):
        LocalisedBalance(1.0)


# expert-gate


def test_expert_gate_errors_are_those_of_each_autoencoder():
    moe, x = layer("expert-gate", gate_hidden=6, temperature=1.5), tokens(5)
    gate = moe.router.scorer
    gate.fit(x)
    v = ((x - x.mean(0)) / x.std(0, correction=0)).sigmoid()
    for e in range(4):
        code = (v @ gate.encode[e] + gate.encode_bias[e]).relu()
        back = (code @ gate.decode[e] + gate.decode_bias[e]).sigmoid()
        assert_close(moe.route(x).logits[:, e], -(v - back).square().sum(1) / 1.5)
        entropy = -(v * back.log() + (1 - v) * (1 - back).log()).sum(1)
        assert_close(gate.cross_entropy(x)[:, e], entropy)


def test_expert_gate_prefers_the_task_that_reconstructs_exactly():
    moe, x = layer("expert-gate", gate_hidden=5), tokens(1).expand(6, 5)
    gate = moe.router.scorer
    with torch.no_grad():
        gate.decode[2], gate.decode_bias[2] = 0, x[0]  # a task of one input, known by heart
    decision = moe.route(x)
    assert decision.notes["choice"].flatten().tolist() == [2] * 6
    assert decision.probs.argmax(1).tolist() == [2] * 6
    assert_close(decision.routing.weight, torch.ones(6, dtype=torch.float64))


def test_expert_gate_a_new_expert_leaves_the_errors_of_the_others():
    few, many, x = layer("expert-gate", 3, gate_hidden=4), layer("expert-gate", 4, gate_hidden=4), tokens(6)
    for name, parameter in few.router.scorer.named_parameters():
        getattr(many.router.scorer, name).data[:3] = parameter.data
    assert_close(many.router.scorer.errors(x)[:, :3], few.router.scorer.errors(x))
    domain = torch.full((6,), 3)
    Reconstruction(2.0)(many.route(x, Context(domain=domain))).backward()
    assert many.router.scorer.encode.grad.flatten(1).any(1).tolist() == [False, False, False, True]


def test_expert_gate_trains_by_reconstruction_of_the_own_task():
    moe, x, domain = layer("expert-gate", gate_hidden=4), tokens(5), torch.tensor([0, 3, 1, 1, 2])
    valid = torch.tensor([True, True, False, True, True])
    loss = Reconstruction(2.0)(moe.route(x, Context(domain=domain, valid=valid)))
    errors = moe.router.scorer.errors(x)
    assert_close(loss, sum(errors[t, domain[t]] for t in (0, 1, 3, 4)) / 4)
    with pytest.raises(ValueError, match=r"call the layer with Context\(domain"):
        Reconstruction(2.0)(moe.route(x))
    with pytest.raises(ValueError, match="temperature=0"):
        layer("expert-gate", temperature=0)
    assert_close(relatedness(torch.tensor(1.1), torch.tensor(1.0)), torch.tensor(0.9))


# eigen-dmoe


def test_eigen_dmoe_gate_has_two_layers():
    moe, x = layer("eigen-dmoe", gate_hidden=7), tokens(5)
    gate = moe.router.scorer
    hidden = (x @ gate.inner.weight.T + gate.inner.bias).relu()
    p = (hidden @ gate.outer.weight.T + gate.outer.bias).softmax(1)
    assert_close(moe(x), torch.einsum("te,tew->tw", p, outputs(moe, x)))
    assert isinstance(gate, TwoLayer)


def test_eigen_dmoe_guard_follows_its_rule_and_bounds_the_lead():
    moe = layer("eigen-dmoe", margin=2.0, constrained_steps=None)
    log = RoutingLog(moe)
    total = torch.zeros(4, dtype=torch.float64)
    fixed = torch.tensor([2.0, 1.0, -1.0, -2.0], dtype=torch.float64)
    masked = 0
    for _ in range(60):
        x = tokens(8)
        p = (moe.router.scorer(x) * 0.1 + fixed).softmax(1)
        moe.router.scorer.outer.bias.data.copy_(fixed)
        with log.recording():
            decision = moe.route(x)
        log.update_controllers()
        p = decision.probs * (total - total.mean() <= 2.0)
        p = p / p.sum(1, keepdim=True)
        assert_close(decision.routing.combine_matrix(), p)
        total += p.mean(0).detach()
        masked += int((p == 0).any())
        assert float(total.max() - total.mean()) <= 3.0
    assert masked > 5
    assert_close(moe.router.total.double(), total, rtol=1e-5, atol=1e-5)


def test_eigen_dmoe_counts_a_step_once_however_it_is_split_and_recomputed():
    """Recomputation in backward must neither count again nor meet another mask than the forward pass."""
    whole, split = (layer("eigen-dmoe", margin=0.05, constrained_steps=None) for _ in range(2))
    split.load_state_dict(whole.state_dict())
    logs, x = [RoutingLog(whole), RoutingLog(split)], tokens(12)
    valid = torch.arange(12) % 5 != 0
    for _ in range(4):
        with logs[0].recording():
            y = whole(x, Context(valid=valid))
        y.square().sum().backward()
        for rows in (slice(0, 5), slice(5, 12)):
            with logs[1].recording():
                y = checkpoint(split, x[rows], Context(valid=valid[rows]), use_reentrant=False)
            y.square().sum().backward()
        for log in logs:
            log.update_controllers()
    assert whole.router.calls == split.router.calls == 4
    assert_close(split.router.total, whole.router.total)
    assert_close(float(whole.router.total.sum()), 4.0)
    assert (whole.router.total - whole.router.total.mean() > 0.05).any(), "somebody sits out"
    for one, other in zip(whole.parameters(), split.parameters(), strict=True):
        assert_close(other.grad, one.grad)


def test_eigen_dmoe_is_free_without_margin_after_its_steps_and_in_evaluation():
    x = tokens(6)
    for options in ({"margin": math.inf, "constrained_steps": None}, {"margin": 0.1, "constrained_steps": 3}):
        moe = layer("eigen-dmoe", **options)
        moe.router.scorer.outer.bias.data[0] += 5
        log = RoutingLog(moe)
        for _ in range(5):
            with log.recording():
                decision = moe.route(x)
            log.update_controllers()
        assert_close(decision.routing.combine_matrix(), decision.probs)
    moe = layer("eigen-dmoe", margin=0.1, constrained_steps=None)
    moe.router.total[1] = 10
    assert not moe.route(x).routing.combine_matrix()[:, 1].any()
    before, log = moe.router.total.clone(), RoutingLog(moe.eval())
    with log.recording():
        assert moe.route(x).routing.combine_matrix()[:, 1].all()
    log.update_controllers()
    assert torch.equal(moe.router.total, before), "evaluation does not count"
    with pytest.raises(ValueError, match="margin=0"):
        layer("eigen-dmoe", margin=0)
    with pytest.raises(ValueError, match="steps=5 has no effect without a margin"):
        layer("eigen-dmoe", margin=math.inf, constrained_steps=5)
