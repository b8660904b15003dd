"""Capacities, varying numbers of experts, assignments and other selectors of the catalogue, check by check."""

import math

import pytest
import torch
from oracles.entry import entry
from oracles.routes import best, counts_times_probability, lively, same_routing, share, tokens
from torch.testing import assert_close

import moestro
from moestro.balance import CommunicationBalance, RoutingLog
from moestro.balance.smooth import softmax_importance_cv_squared, threshold_load_cv_squared
from moestro.routers import DropByPositionPerExpert
from moestro.routers.assignment import balanced_assignment
from moestro.routers.dselect import smooth_step
from moestro.routers.plans import sinkhorn
from moestro.routing import Context, Selection

ONE = torch.ones((), dtype=torch.float64)


def cv_squared(values):
    n, mean = len(values), sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / n / (mean**2 + 1e-10)


# ---- deepseek-v2


@entry("deepseek-v2")
def test_deepseek_v2_routes_and_loses_by_its_equations(method):
    def slow(x, p):
        probs = [share(x[t] @ p["scorer.weight"].T) for t in range(len(x))]
        chosen, rows, touched = [], [], [0] * 4
        for q in probs:
            groups = best(torch.stack([q[2 * g : 2 * g + 2].max() for g in range(4)]), 2)
            masked = torch.stack([q[i].detach() if i // 2 in groups else 0 * ONE for i in range(8)])
            chosen.append(best(masked, 3))
            rows.append({i: 16 * q[i] for i in chosen[-1]})
            for g in {i // 2 for i in chosen[-1]}:
                touched[g] += 1
        mean = [sum(q[2 * g] + q[2 * g + 1] for q in probs) / len(x) for g in range(4)]
        load = [sum(c.count(2 * g) + c.count(2 * g + 1) for c in chosen) for g in range(4)]
        return rows, {
            "balance": counts_times_probability(probs, chosen, 3 * len(x)),
            "device_balance": sum(4 / (3 * len(x)) * load[g] * mean[g] for g in range(4)),
            "communication_balance": sum(4 / (2 * len(x)) * touched[g] * mean[g] for g in range(4)),
        }

    moe = lively(method, top_k=3, num_groups=4, groups_kept=2, device_balance=0.05, communication_balance=0.02)
    same_routing(moe, slow)


@entry("deepseek-v2")
def test_deepseek_v2_all_groups_are_plain_top_k_and_few_groups_bound_the_devices(method):
    free = lively(method, top_k=3, num_groups=4, groups_kept=4).route(tokens())
    plain = lively(method, top_k=3).route(tokens())
    assert torch.equal(free.notes["choice"], plain.notes["choice"])
    bound = lively(method, top_k=3, num_groups=4, groups_kept=2).route(tokens(200)).notes["choice"] // 2
    assert max(len(set(row)) for row in bound.tolist()) <= 2


@entry("deepseek-v2")
def test_deepseek_v2_communication_shares_sum_to_the_devices(method):
    """f'' sums to D when every token uses exactly M devices: uniform probabilities then give 1."""
    moe = lively(method, top_k=2, num_groups=4, groups_kept=2)
    decision = moe.route(tokens())
    choice = torch.tensor([[0, 2], [4, 7], [1, 5]])
    uniform = torch.full((3, 8), 0.125)
    noted = type(decision)(decision.routing, None, uniform, {"choice": choice})
    assert_close(CommunicationBalance(4, 2)(noted), torch.tensor(1.0))


@entry("deepseek-v2")
def test_deepseek_v2_drops_the_least_affine_of_a_crowded_device(method):
    moe = lively(method, top_k=2, num_groups=2, groups_kept=2, capacity_factor=1.0, protected=0.0).train()
    decision = moe.route(tokens(10))
    choice, kept = decision.notes["choice"], decision.notes["kept"]
    weight = decision.probs.gather(1, choice)
    for device in range(2):
        here = choice // 4 == device
        stay, go = weight[here & kept], weight[here & ~kept]
        assert len(stay) == min(10, int(here.sum()))
        assert not len(go) or float(stay.detach().min()) >= float(go.detach().max())
    assert moe.eval().route(tokens(10)).routing.load().sum() == 20


@entry("deepseek-v2")
def test_deepseek_v2_protected_sequences_lose_nothing(method):
    moe = lively(method, top_k=2, num_groups=2, groups_kept=2, capacity_factor=0.5, protected=1.0).train()
    assert moe.route(tokens(10), Context(sequence=torch.arange(10) // 5)).notes["kept"].all()


@entry("deepseek-v2")
def test_deepseek_v2_says_what_cannot_act_on_one_group(method):
    for option in ("device_balance", "communication_balance", "capacity_factor"):
        with pytest.raises(ValueError, match="cannot act on one group"):
            lively(method, **{option: 1.0})


# ---- v-moe


def v_moe_slow(std, noise):
    def slow(x, p):
        clean = [x[t] @ p["scorer.weight"].T for t in range(len(x))]
        noisy = [z + n for z, n in zip(clean, noise, strict=True)]
        probs = [share(h) for h in noisy]
        chosen = [best(q, 2) for q in probs]
        rows = [{i: q[i] for i in c} for c, q in zip(chosen, probs, strict=True)]
        load = []
        for i in range(8):
            total = 0 * ONE
            for z, h in zip(clean, noisy, strict=True):
                threshold = h[best(h, 2)[1]]
                total = total + 1 - (1 + torch.erf((threshold - z[i]) / std / math.sqrt(2))) / 2
            load.append(total / len(x))
        importance = cv_squared([sum(share(z)[i] for z in clean) for i in range(8)])
        return rows, {"importance": importance, "load": cv_squared(load)}

    return slow


@entry("v-moe")
def test_v_moe_routes_and_loses_by_its_equations(method):
    moe = lively(method, capacity_factor=4.0).train()
    torch.manual_seed(3)
    noise = torch.randn(12, 8, dtype=torch.float64) / 8
    torch.manual_seed(3)
    same_routing(moe, v_moe_slow(1 / 8, noise))


@entry("v-moe")
def test_v_moe_losses_vanish_at_uniform_logits(method):
    moe = lively(method).train()
    torch.nn.init.zeros_(moe.router.scorer.weight)
    decision = moe.route(tokens())
    assert_close(softmax_importance_cv_squared(decision), 0 * ONE)
    assert_close(threshold_load_cv_squared(decision), 0 * ONE)


@entry("v-moe")
def test_v_moe_priority_without_a_limit_is_the_plain_order(method):
    plain, priority = (lively(method, capacity_factor=8.0, priority=p).eval() for p in ("position", "batch"))
    x = tokens()
    assert torch.equal(plain.route(x).routing.combine_matrix(), priority.route(x).routing.combine_matrix())


@entry("v-moe")
def test_v_moe_priority_keeps_the_first_choices_of_largest_weight(method):
    decision = lively(method, capacity_factor=0.1, priority="batch").eval().route(tokens(60))
    choice, kept = decision.notes["choice"][:, 0], decision.notes["kept"][:, 0]
    weight = decision.probs.detach().amax(1)
    for e in range(8):
        stay, go = weight[(choice == e) & kept], weight[(choice == e) & ~kept]
        assert len(stay) <= 4
        assert not len(go) or (len(stay) == 4 and float(stay.min()) >= float(go.max()))
    assert not kept.all()


@entry("v-moe")
@pytest.mark.parametrize(("tokens_", "factor", "slots"), [(49, 1.05, 16), (16, 1.0, 4), (17, 1.0, 8)])
def test_v_moe_capacity_is_a_multiple_of_four(method, tokens_, factor, slots):
    from moestro.routers import slots_in_fours

    assert slots_in_fours(tokens_, 8, factor, 2) == slots


# ---- moe-plus-plus


@entry("moe-plus-plus")
def test_moe_plus_plus_routes_and_loses_by_its_equations(method):
    previous = lively(method, seed=5).route(tokens(seed=9))

    def slow(x, p):
        probs = []
        for t in range(len(x)):
            z = x[t] @ p["scorer.scorer.weight"].T + p["scorer.weight"] @ previous.logits[t].detach()
            probs.append(share(z))
        chosen = [best(q, 2) for q in probs]
        loss = 0 * ONE
        for i in range(11):
            f = sum(c.count(i) for c in chosen) / len(x)
            loss = loss + (1.0 if i < 8 else 0.75) * f * sum(q[i] for q in probs) / len(x)
        return [{i: q[i] for i in c} for c, q in zip(chosen, probs, strict=True)], {"balance": loss}

    same_routing(lively(method), slow, context=Context(previous=previous))


@entry("moe-plus-plus")
def test_moe_plus_plus_free_experts_do_what_they_say(method):
    moe, x = lively(method), tokens(1)
    assert [type(bank).__name__ for bank in moe.experts.banks[1:]] == [
        "ZeroExperts", "CopyExperts", "ConstantExperts",
    ]  # fmt: skip
    run = lambda e: moe.experts(x, torch.tensor([0] * (e + 1) + [1] * (11 - e)))  # noqa: E731
    assert not run(8).any()
    assert_close(run(9), x)
    constant = moe.experts.banks[3]
    a = share(torch.stack([x[0] @ constant.weight[0, :, 0], x[0] @ constant.weight[0, :, 1]]))
    assert_close(run(10)[0], a[0] * x[0] + a[1] * constant.vector[0])


@entry("moe-plus-plus")
def test_moe_plus_plus_free_experts_have_more_slots(method):
    from moestro.routers import slots_by_price

    slots = slots_by_price(1000, factor=1.0, k=2, dear=6, free=2, tau=0.5)
    assert slots == [200] * 6 + [400] * 2
    moe = lively(method, capacity_factor=0.5)
    load = moe.route(tokens(100)).routing.load()
    unit = 0.5 * 2 * 100 / (0.75 * 8 + 3)
    assert int(load[:8].max()) <= math.ceil(0.75 * unit)
    assert int(load[8:].max()) <= math.ceil(unit)
    drop = DropByPositionPerExpert(lambda total: [1, total // 2])
    kept = drop(Selection(torch.tensor([[0], [1]] * 4)), torch.ones(8, 1), 2, Context()).keep
    assert kept.flatten().tolist() == [True, True, False, True, False, True, False, True]
    kept = drop(Selection(torch.tensor([[1]] * 8)), torch.ones(8, 1), 2, Context()).keep
    assert int(kept.sum()) == 4


@entry("moe-plus-plus")
def test_moe_plus_plus_refuses_nothing_free_and_a_stranger_before_it(method):
    with pytest.raises(ValueError, match="nor all be 0"):
        lively(method, zero=0, copy=0, constant=0)
    stranger = lively("mixtral").route(tokens())
    with pytest.raises(ValueError, match="give all layers the same experts"):
        lively(method).route(tokens(), Context(previous=stranger))


# ---- remoe


@entry("remoe")
def test_remoe_routes_and_loses_by_its_equations(method):
    def slow(x, p):
        scores = [(x[t] @ p["scorer.weight"].T).clamp(min=0) for t in range(len(x))]
        rows = [{i: s[i] for i in range(8) if float(s.detach()[i]) > 0} for s in scores]
        loss = 0 * ONE
        for i in range(8):
            f = 8 / (2 * len(x)) * sum(i in row for row in rows)
            loss = loss + f * sum(s[i] for s in scores) / len(x)
        return rows, {"l1": 0.5 * loss}

    same_routing(lively(method, l1=0.5), slow)


@entry("remoe")
def test_remoe_weight_moves_by_its_rate_towards_the_wanted_sparsity(method):
    moe = lively(method, top_k=2, l1=1.0, rate=1.5)
    log = RoutingLog(moe)
    with log.recording():
        moe(tokens(100))  # about half of 8 experts per token: too many
    log.update_controllers()
    scale = moe.losses["l1"][1].scale
    assert_close(scale, torch.tensor(1.5))
    torch.nn.init.zeros_(moe.router.scorer.weight)
    with log.recording():
        moe(tokens(100))
    log.update_controllers()
    assert_close(scale, torch.tensor(1.0))
    assert moe.bfloat16().losses["l1"][1].scale.dtype == torch.float32


@entry("remoe")
def test_remoe_training_reaches_the_wanted_number_of_experts(method):
    torch.manual_seed(0)
    moe = moestro.build(method, width=6, hidden=8, num_experts=8, top_k=2, l1=1e-3)
    log, optimizer = RoutingLog(moe), torch.optim.Adam(moe.parameters(), lr=1e-2)
    x = torch.randn(128, 6) + 1  # about zero every map is positive for half of the tokens
    used = []
    for _ in range(150):
        with log.recording():
            loss = (moe(x) - x.roll(1, 1)).square().mean()
        optimizer.zero_grad()
        (loss + log.auxiliary_loss()).backward()
        optimizer.step()
        log.update_controllers()
        used.append(float(log.decisions[""][0].routing.load().sum()) / 128)
    assert 1.3 < sum(used[-60:]) / 60 < 2.7
    with pytest.raises(ValueError, match="rate=1"):
        lively(method, rate=1.0)


# ---- dynamic-top-p


@entry("dynamic-top-p")
@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.4, 0.7, 0.95])
def test_dynamic_top_p_routes_and_loses_by_its_equations(method, threshold):
    def slow(x, p):
        probs, chosen = [share(x[t] @ p["scorer.weight"].T) for t in range(len(x))], []
        for q in probs:
            order, total, take = best(q, 8), 0.0, []
            for i in order:
                take.append(i)
                total += float(q.detach()[i])
                if total > threshold:
                    break
            chosen.append(take)
        balance = counts_times_probability(probs, chosen, sum(map(len, chosen)))
        entropy = sum(-(q * q.log()).sum() for q in probs) / len(x)
        rows = [{i: q[i] for i in c} for c, q in zip(chosen, probs, strict=True)]
        return rows, {"balance": balance, "entropy": entropy}

    same_routing(lively(method, threshold=threshold), slow)


@entry("dynamic-top-p")
def test_dynamic_top_p_at_its_ends(method):
    def used(threshold, x):
        return lively(method, threshold=threshold).route(x).routing.load().sum()

    assert used(0.0, tokens()) == 12
    assert used(1.0, tokens()) == 12 * 8
    uniform = lively(method, threshold=0.4, num_experts=16)
    torch.nn.init.zeros_(uniform.router.scorer.weight)
    assert uniform.route(tokens()).routing.load().sum() == 12 * 7  # floor(0.4 * 16) + 1, the bound


@entry("dynamic-top-p")
def test_dynamic_top_p_a_surer_router_uses_fewer_experts(method):
    moe = lively(method, threshold=0.6)
    used = []
    for heat in (0.0, 0.3, 1.0, 3.0, 30.0):
        scaled = lively(method, threshold=0.6)
        scaled.router.scorer.weight.data.mul_(heat)
        used.append(scaled.route(tokens(1)).routing.load().sum().item())
    assert used == sorted(used, reverse=True)
    assert used[0] == 5
    assert used[-1] == 1
    with pytest.raises(ValueError, match=r"threshold=1\.5"):
        lively(method, threshold=1.5)
    assert moe.top_k == 5


# ---- base-layers


@entry("base-layers")
@pytest.mark.parametrize("seed", range(6))
def test_base_layers_assignment_is_the_best_balanced_one(method, seed):
    optimize = pytest.importorskip("scipy.optimize")
    moe, x = lively(method, num_experts=4, seed=seed).train(), tokens(20, seed=seed)
    decision = moe.route(x)
    assert decision.routing.load().tolist() == [5] * 4
    columns = decision.logits.detach().repeat_interleave(5, 1).numpy()
    row, column = optimize.linear_sum_assignment(columns, maximize=True)
    ours = decision.logits.gather(1, decision.notes["choice"]).sum().item()
    assert ours == pytest.approx(columns[row, column].sum(), abs=1e-9)


@entry("base-layers")
def test_base_layers_ragged_tokens_and_padding(method):
    moe = lively(method, num_experts=4).train()
    load = moe.route(tokens(22), Context(valid=torch.arange(22) != 3)).routing.load()
    assert sorted(load.tolist()) == [5, 5, 5, 6]


@entry("base-layers")
def test_base_layers_evaluation_is_greedy_and_weights_are_sigmoids(method):
    moe = lively(method, num_experts=4)
    x = tokens()
    for phase in (True, False):
        decision = moe.train(phase).route(x)
        z = x @ moe.router.scorer.weight.T
        chosen = decision.notes["choice"]
        expected = torch.zeros(12, 4, dtype=torch.float64).scatter(
            1, chosen, 1 / (1 + (-z.gather(1, chosen)).exp())
        )
        assert_close(decision.routing.combine_matrix(), expected)
    assert torch.equal(chosen[:, 0], z.argmax(1))
    assert moe.causal_evaluation
    assert not moe.causal


@entry("base-layers")
def test_base_layers_with_the_residual_interpolates_block_and_identity(method):
    """alpha (h + FFN h) + (1 - alpha) h = h + alpha FFN h; with a zero second layer nothing changes."""
    moe, x = lively(method, num_experts=4).eval(), tokens()
    matrix = moe.route(x).routing.combine_matrix()
    for t in range(12):
        e = int(matrix[t].argmax())
        alpha = matrix[t, e]
        f = x[t : t + 1] + moe.experts(x[t : t + 1], torch.tensor([0] * (e + 1) + [1] * (4 - e)))
        assert_close((x + moe(x))[t : t + 1], alpha * f + (1 - alpha) * x[t : t + 1])
    torch.nn.init.zeros_(moe.experts.down)
    assert_close(x + moe(x), x)


@entry("base-layers")
def test_base_layers_survives_infinite_scores(method):
    scores = torch.tensor([[0.0, -torch.inf], [0.0, -torch.inf], [1.0, -torch.inf], [0.5, -torch.inf]])
    from moestro.routers import BalancedAssignment

    index = BalancedAssignment()(scores.exp()).index.flatten()
    assert index.bincount().tolist() == [2, 2]
    assert index[2:].tolist() == [0, 0]


def test_balanced_assignment_moves_along_chains() -> None:
    """Token 0 wants 0, token 1 wants 0 and hardly less 1, token 2 wants 1 and hardly less 2."""
    import numpy as np

    scores = np.array([[9.0, 0.0, 0.0], [8.0, 7.9, 0.0], [0.0, 5.0, 4.9]])
    assert balanced_assignment(scores).tolist() == [0, 1, 2]


# ---- s-base-sinkhorn


@entry("s-base-sinkhorn")
def test_s_base_sinkhorn_plan_has_its_sums_and_ignores_a_bias_per_expert(method):
    z = 3 * tokens(40, 8)
    plan = sinkhorn(z, 2000, 1e-12).exp() / 40
    assert_close(plan.sum(1), torch.full((40,), 1 / 40, dtype=torch.float64))
    assert_close(plan.sum(0), torch.full((8,), 1 / 8, dtype=torch.float64))
    shifted = sinkhorn(z + 5 * tokens(1, 8), 2000, 1e-12).exp() / 40
    assert_close(shifted, plan, rtol=1e-8, atol=1e-10)
    u, v = torch.ones(40, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    for _ in range(2000):  # the released iteration, without the log domain
        u = 1 / 40 / (z.exp() @ v)
        v = 1 / 8 / (z.exp().T @ u)
    assert_close(plan, u[:, None] * z.exp() * v, rtol=1e-6, atol=1e-9)


@entry("s-base-sinkhorn")
@pytest.mark.parametrize("top_k", [1, 2])
def test_s_base_sinkhorn_selects_by_the_plan_and_weighs_by_the_logits(method, top_k):
    moe, x = lively(method, top_k=top_k), tokens(30)
    z = x @ moe.router.scorer.weight.detach().T
    plan = sinkhorn(z, 200, 1e-4)
    for phase, scores in ((True, plan), (False, z)):
        decision = moe.train(phase).route(x)
        chosen = [best(row, top_k) for row in scores]
        assert decision.notes["choice"].tolist() == chosen
        for t, row in enumerate(chosen):
            for i in row:
                weight = 1 / (1 + (-z[t, i]).exp()) if top_k == 1 else share(z[t])[i]
                assert_close(decision.routing.combine_matrix()[t, i].detach(), weight)
    assert not torch.equal(plan.argmax(1), z.argmax(1))


@entry("s-base-sinkhorn")
def test_s_base_sinkhorn_evens_the_load_and_does_not_overflow(method):
    moe, x = lively(method), tokens(400)
    moe.router.scorer.weight.data[0] *= 4
    train, evaluation = (moe.train(p).route(x).routing.load().max() for p in (True, False))
    assert train < evaluation
    assert sinkhorn(1000 * tokens(6, 3), 200, 1e-4).isfinite().all()
    assert lively(method, num_experts=1).train().route(x).routing.load().tolist() == [400]


# ---- x-moe


@entry("x-moe")
def test_x_moe_routes_and_loses_by_its_equations(method):
    def slow(x, p):
        probs, cold = [], []
        for t in range(len(x)):
            h = p["scorer.projection"] @ x[t]
            s = torch.stack([h @ v / (h.norm() * v.norm()) for v in p["scorer.embedding"]])
            probs.append(share(s / p["gate.log_tau"].exp()))
            cold.append(share(s / 0.07))
        chosen = [best(q, 1) for q in probs]
        rows = [{c[0]: q[c[0]]} for c, q in zip(chosen, probs, strict=True)]
        return rows, {"balance": counts_times_probability(cold, chosen, len(x))}

    moe = lively(method)
    assert moe.router.scorer.embedding.shape == (8, 4)
    same_routing(moe, slow)


@entry("x-moe")
def test_x_moe_scores_are_cosines_whose_gradient_has_low_rank(method):
    moe, x = lively(method), tokens().requires_grad_()
    scores = moe.route(x).logits
    assert float(scores.detach().abs().max()) <= 1 + 1e-12
    assert_close(moe.route(7 * x).logits, scores)
    (gradient,) = torch.autograd.grad(scores[:, 0].sum(), x)
    projection = moe.router.scorer.projection.detach()
    assert torch.linalg.matrix_rank(torch.cat([projection, gradient])) == 4  # in the span of 4 directions
    h = x.detach() @ projection.T
    reduced = torch.linalg.lstsq(projection.T, gradient.T).solution.T
    assert_close((reduced * h).sum(1), torch.zeros(12, dtype=torch.float64))


@entry("x-moe")
def test_x_moe_starts_at_its_temperature(method):
    moe = moestro.build(method, width=6, hidden=3, num_experts=32)
    assert moe.router.scorer.embedding.shape == (32, 16)
    assert_close(moe.router.gate.log_tau.exp(), torch.tensor(0.3))
    gram = moe.router.scorer.embedding.T @ moe.router.scorer.embedding
    assert_close(gram, 0.32**2 * torch.eye(16), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="temperature=0"):
        lively(method, temperature=0.0)


# ---- dselect-k


def slow_step(t, g):
    if t <= -g / 2:
        return 0.0
    return 1.0 if t >= g / 2 else -2 * t**3 / g**3 + 3 * t / (2 * g) + 0.5


@entry("dselect-k")
@pytest.mark.parametrize("num_experts", [4, 6, 8, 1])
def test_dselect_k_routes_by_its_equations(method, num_experts):
    top_k, gamma = min(2, num_experts), 60.0
    moe = lively(method, num_experts=num_experts, top_k=top_k, gamma=gamma)
    x, router = tokens(), moe.router
    decision = moe.route(x)
    bits = (num_experts - 1).bit_length()
    loss = 0.0
    for t in range(12):
        mix, row = share(x[t] @ router.mixer.T + router.mixer_bias).detach(), [0.0] * num_experts
        for j in range(top_k):
            z = (router.weight[j] @ x[t] + router.bias[j]).tolist()
            code = [
                math.prod(
                    slow_step(z[b], gamma) if i >> (bits - 1 - b) & 1 else 1 - slow_step(z[b], gamma)
                    for b in range(bits)
                )
                for i in range(num_experts)
            ]
            loss -= sum(r * math.log(r + 1e-6) for r in code) / 12
            loss += 1 / sum(code) / 12 if num_experts == 6 else 0.0
            row = [a + float(mix[j]) * r for a, r in zip(row, code, strict=True)]
        assert_close(decision.routing.combine_matrix()[t].detach(), torch.tensor(row, dtype=torch.float64))
    assert moe.losses["entropy"][1](decision).item() == pytest.approx(loss)


@entry("dselect-k")
def test_dselect_k_smooth_step_and_saturated_codes(method):
    t = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0], requires_grad=True)
    step = smooth_step(t, 2.0)
    assert step.tolist() == [0, 0, 0.5, 1, 1]
    (slope,) = torch.autograd.grad(step.sum(), t)
    assert slope.tolist() == [0, 0, 0.75, 0, 0]  # 1.5 / gamma at the middle
    moe = lively(method, top_k=2)
    torch.nn.init.zeros_(moe.router.weight)
    moe.router.bias.data = torch.tensor([[9.0, -9.0, 9.0], [-9.0, 9.0, 9.0]]).double()
    assert moe.route(tokens()).routing.load().tolist() == [0, 0, 0, 12, 0, 12, 0, 0]  # 011 and 101
    for selectors in (moe.route(tokens()).notes["selectors"], lively(method).route(tokens()).notes["selectors"]):
        assert_close(selectors.sum(-1), torch.ones(12, 2, dtype=torch.float64))


@entry("dselect-k")
def test_dselect_k_gradients_agree_with_differences(method):
    moe, x = lively(method, num_experts=4, gamma=9.0), tokens(3)
    probe = tokens(3, 4)

    def objective(weight):
        moe.router.weight.data = weight
        return float((moe.route(x).routing.combine_matrix() * probe).sum().detach())

    start = moe.router.weight.detach().clone()
    (gradient,) = torch.autograd.grad((moe.route(x).routing.combine_matrix() * probe).sum(), moe.router.weight)
    for place in ((0, 0, 0), (1, 1, 4)):
        bump = torch.zeros_like(start)
        bump[place] = 1e-6
        slope = (objective(start + bump) - objective(start - bump)) / 2e-6
        assert slope == pytest.approx(float(gradient[place]), rel=1e-4, abs=1e-7)
