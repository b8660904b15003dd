"""More routers of the catalogue: retries, groups, tasks, mixes with a shared expert, two levels."""

import math

import pytest
import torch
from oracles.entry import entry
from oracles.routes import best, counts_times_probability, lively, same_routing, share, tokens
from torch.testing import assert_close

import moestro
from moestro.balance import RoutingLog, TaskInformation
from moestro.routers import BlockMeans, locmoe_slots
from moestro.routing import Context

ONE = torch.ones((), dtype=torch.float64)


def first_choices(chosen):
    return [c[:1] for c in chosen]


# ---- switch-ntlb


@entry("switch-ntlb")
@pytest.mark.parametrize("seed", range(5))
def test_switch_ntlb_retries_as_written(method, seed):
    def slow(x, p):
        probs = [share(x[t] @ p["scorer.scorer.weight"].T) for t in range(len(x))]
        chosen, used, rows = [best(q, 4) for q in probs], [0] * 4, [{} for _ in x]
        for attempt in range(4):
            for t in range(len(x)):
                e = chosen[t][attempt]
                if not rows[t] and used[e] < 4:
                    rows[t][e] = probs[t][e]
                    used[e] += 1
        return rows, {"balance": counts_times_probability(probs, chosen, 4 * len(x))}

    moe = lively(method, num_experts=4, eval_capacity_factor=1.0, seed=seed).eval()
    moe.router.scorer.scorer.weight.data[:2] += 1.5 * tokens(1, seed=seed)  # two experts agree, and fill up
    decision = same_routing(moe, slow, tokens(16, seed=seed))
    assert decision.routing.load().tolist() == [4] * 4, "capacity 1 and all passes place every token"


@entry("switch-ntlb")
def test_switch_ntlb_without_a_limit_is_switch(method):
    ours, switch = (lively(m, eval_capacity_factor=8.0).eval() for m in (method, "switch"))
    assert torch.equal(
        ours.route(tokens()).routing.combine_matrix(), switch.route(tokens()).routing.combine_matrix()
    )


# ---- glam, artetxe-moe, openmoe


@entry("glam")
def test_glam_is_gshard_and_has_the_published_size(method):
    ours, gshard = (lively(m).eval() for m in (method, "gshard-top2"))
    assert torch.equal(
        ours.route(tokens()).routing.combine_matrix(), gshard.route(tokens()).routing.combine_matrix()
    )
    with torch.device("meta"):
        counts = moestro.build(
            method, width=8192, hidden=32768, num_experts=64, activation="gelu"
        ).parameter_counts()
    attention, dense = 4 * 8192 * 128 * 128, 3 * 8192 * 32768
    rest = 64 * attention + 32 * dense + 256_000 * 8192
    assert round((32 * counts.total + rest) / 1e12, 1) == 1.2
    assert round((32 * counts.active + rest) / 1e9) == pytest.approx(96.6, rel=0.05)


@entry("artetxe-moe")
def test_artetxe_moe_evaluates_with_a_share_of_all_tokens(method):
    x = torch.ones(20, 6, dtype=torch.float64)
    moe = lively(method, eval_fraction=0.25)
    assert moe.eval().route(x).routing.load().sort().values.tolist() == [0] * 6 + [5, 5]
    assert int(moe.train().route(x).routing.load().max()) == 2 * math.ceil(20 / 8)


@entry("artetxe-moe")
def test_artetxe_moe_has_the_published_size(method):
    """1.1 trillion: 32 layers of width 4096, every other one a mixture of 512 experts."""
    with torch.device("meta"):
        counts = moestro.build(
            method, width=4096, hidden=16384, num_experts=512, activation="gelu", bias=True
        ).parameter_counts()
    rest = 32 * 4 * 4096 * 4096 + 16 * 2 * 4096 * 16384 + 51200 * 4096
    assert round((16 * counts.total + rest) / 1e12, 1) == 1.1


@entry("artetxe-moe")
def test_artetxe_moe_expert_gradient_scale_is_lost_in_adam(method):
    """A constant factor on the gradients changes no step of plain Adam, but it changes a norm for clipping."""
    steps = []
    for factor in (1.0, 1 / 4):
        weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = torch.optim.Adam([weight], lr=0.1, eps=0)
        for step in range(3):
            weight.grad = factor * torch.tensor([1.0, -2.0, 0.5 + step]).double()
            optimizer.step()
        steps.append(weight.detach().clone())
    assert_close(*steps)
    assert float((steps[0] - 1).abs().max()) > 0


@entry("openmoe")
def test_openmoe_drops_towards_the_end(method):
    """On a skewed router the share of dropped tokens grows with the position."""
    moe = lively(method, capacity_factor=1.0, eval_capacity_factor=1.0).eval()
    moe.router.scorer.scorer.weight.data[0] *= 5
    kept = moe.route(tokens(400)).notes["kept"].double().mean(1)
    assert float(kept[:100].mean()) > float(kept[-100:].mean()) + 0.2
    st = lively("st-moe", capacity_factor=1.0, eval_capacity_factor=1.0).eval()
    st.router.scorer.scorer.weight.data[0] *= 5
    assert torch.equal(moe.route(tokens()).routing.combine_matrix(), st.route(tokens()).routing.combine_matrix())
    x = tokens()
    assert_close(moe(x), moe.experts.run(x, moe.route(x).routing) + moe.shared(x))


# ---- skywork-moe


@entry("skywork-moe")
def test_skywork_moe_routes_and_loses_by_its_equations(method):
    def slow(x, p):
        logits = [x[t] @ p["scorer.weight"].T + p["scorer.bias"] for t in range(len(x))]
        probs = []
        for z in logits:
            spread = (((z - z.mean()) ** 2).mean() + 1e-12).sqrt()
            probs.append(share(1.5 * (z - z.mean()) / spread))
        chosen = [best(q, 2) for q in probs]
        rows = [{i: q[i] / sum(q[j] for j in c) for i in c} for c, q in zip(chosen, probs, strict=True)]
        scale = torch.tensor(1e-2, dtype=torch.float32).double()
        return rows, {"balance": scale * counts_times_probability(probs, chosen, 2 * len(x))}

    same_routing(lively(method, scale=1.5, capacity_factor=9.0), slow)


@entry("skywork-moe")
def test_skywork_moe_logits_are_standardised(method):
    from moestro.routers import Standardised

    gate, z = Standardised(2.0), tokens(5, 8)
    assert_close(gate(3 * z + 7), gate(z), rtol=1e-6, atol=1e-9)
    log = gate(z).log()
    assert_close(log.std(-1, correction=0), torch.full((5,), 2.0, dtype=torch.float64), rtol=1e-6, atol=0)


@entry("skywork-moe")
def test_skywork_moe_weight_follows_the_drops(method):
    moe, x = lively(method, capacity_factor=9.0, decay=0.9), tokens()
    log, scale = RoutingLog(moe), moe.losses["balance"][1].scale
    for _ in range(3):  # nothing is dropped: geometric decay
        with log.recording():
            moe(x)
        log.update_controllers()
    assert_close(scale, torch.tensor(0.01 * 0.9**3))
    crowded = lively(method, capacity_factor=0.1, decay=0.9)  # drops far more than 5 %: the largest weight
    log = RoutingLog(crowded)
    with log.recording():
        crowded(x)
    log.update_controllers()
    assert_close(crowded.losses["balance"][1].scale, torch.tensor(0.01))


# ---- yuan-attention-router


@entry("yuan-attention-router")
def test_yuan_attention_router_routes_by_its_equations(method):
    def slow(x, p):
        logits = []
        for t in range(len(x)):
            q, k, v = (p["scorer.weight"][n] @ x[t] for n in range(3))
            logits.append(torch.stack([share(q[i] * k) @ v for i in range(8)]))
        chosen = [best(z, 2) for z in logits]
        rows = [
            dict(zip(c, share(torch.stack([z[i] for i in c])), strict=True))
            for c, z in zip(chosen, logits, strict=True)
        ]
        return rows, {"balance": counts_times_probability([share(z) for z in logits], chosen, 2 * len(x))}

    same_routing(lively(method), slow)


@entry("yuan-attention-router")
def test_yuan_attention_router_without_queries_or_keys_scores_all_alike(method):
    for n in (0, 1):
        moe, x = lively(method), tokens()
        moe.router.scorer.weight.data[n] = 0
        value = x @ moe.router.scorer.weight[2].T
        assert_close(moe.route(x).logits, value.mean(1, keepdim=True).expand(12, 8))
    assert sum(p.numel() for p in moe.router.parameters()) == 3 * 6 * 8


# ---- m6t-prototyping


@entry("m6t-prototyping")
@pytest.mark.parametrize("k", [1, 2, 4])
def test_m6t_prototyping_routes_by_its_equations(method, k):
    def slow(x, p):
        rows, used = [], [0] * 8
        for t in range(len(x)):
            z, row = x[t] @ p["scorer.weight"].T, {}
            for g in range(k):
                q = share(z[8 // k * g : 8 // k * (g + 1)])
                i = best(q, 1)[0]
                if used[8 // k * g + i] < math.ceil(1.0 * k * len(x) / 8):
                    row[8 // k * g + i] = q[i]
                    used[8 // k * g + i] += 1
            rows.append(row)
        return rows, {}

    moe = lively(method, top_k=k, capacity_factor=1.0)
    decision = same_routing(moe, slow)
    groups = decision.notes["choice"] // (8 // k)
    assert groups.tolist() == [list(range(k))] * 12
    assert moe.causal


@entry("m6t-prototyping")
def test_m6t_prototyping_groups_must_divide(method):
    with pytest.raises(ValueError, match="prototypes=3 does not divide 8 experts"):
        lively(method, top_k=3)


# ---- mod-squad


@entry("mod-squad")
def test_mod_squad_routes_and_loses_by_its_equations(method):
    task = torch.tensor([0, 1, 2] * 4)

    def slow(x, p):
        probs = [share(x[t] @ p["scorer.weight"][task[t]].T) for t in range(len(x))]
        chosen = [best(q, 2) for q in probs]
        joint = [[sum(probs[t][i] for t in range(12) if task[t] == m) / 12 for i in range(8)] for m in range(3)]
        loss = 0 * ONE
        for m in range(3):
            for i in range(8):
                apart = sum(joint[m]) * sum(joint[n][i] for n in range(3))
                loss = loss - joint[m][i] * (joint[m][i] / apart).log()
        return [{i: q[i] for i in c} for c, q in zip(chosen, probs, strict=True)], {"information": loss}

    same_routing(lively(method, num_domains=3, top_k=2).eval(), slow, context=Context(domain=task))


@entry("mod-squad")
def test_mod_squad_information_at_its_ends(method):
    moe = lively(method, num_domains=2, top_k=1)
    task = torch.tensor([0, 1] * 6)
    decision = moe.route(tokens(), Context(domain=task))
    same = type(decision)(decision.routing, None, torch.full((12, 8), 1 / 8), decision.notes)
    assert_close(TaskInformation(2)(same), torch.tensor(0.0))
    own = type(decision)(decision.routing, None, torch.eye(8)[3 * task], decision.notes)
    assert_close(TaskInformation(2)(own), torch.tensor(-math.log(2)))


@entry("mod-squad")
def test_mod_squad_noise_is_the_tasks_own_and_off_in_evaluation(method):
    moe, task = lively(method, num_domains=2), torch.tensor([0, 1] * 6)
    moe.router.noise.weight.data.zero_()
    moe.router.noise.weight.data[1] = 50.0
    x = tokens().abs()
    std = moe.route(x, Context(domain=task)).notes["noise_std"]
    assert_close(std[0::2], torch.full((6, 8), math.log(2) + 0.01, dtype=torch.float64))
    assert bool((std[1::2] > 5).all())
    assert "noise_std" not in moe.eval().route(x, Context(domain=task)).notes
    with pytest.raises(ValueError, match="domain"):
        moe.route(x)


# ---- moduleformer-mi


@entry("moduleformer-mi")
def test_moduleformer_mi_routes_and_loses_by_its_equations(method):
    def slow(x, p):
        probs = []
        for t in range(len(x)):
            h = p["scorer.inner"] @ x[t] + p["scorer.bias"]
            h = h * (1 + torch.erf(h / math.sqrt(2))) / 2
            probs.append(share(p["scorer.outer"] @ h))
        chosen = [best(q, 2) for q in probs]
        mean = sum(probs) / len(x)
        inner = sum(-(q * q.log()).sum() for q in probs) / len(x)
        rows = [{i: q[i] for i in c} for c, q in zip(chosen, probs, strict=True)]
        return rows, {"information": inner + (mean * mean.log()).sum()}

    moe = lively(method, gate_hidden=5).eval()
    moe.router.scorer.outer.data.mul_(0.3)  # no probability of exactly zero
    same_routing(moe, slow)


@entry("moduleformer-mi")
def test_moduleformer_mi_draws_the_tail_in_training_only(method):
    moe = lively(method, top_k=3, sampled=1, gate_dropout=0.0)
    x = tokens(1).repeat(3000, 1)
    decision = moe.train().route(x)
    choice, probs = decision.notes["choice"], decision.probs[0].detach()
    order = best(probs, 8)
    assert choice[:, :2].unique(dim=0).tolist() == [order[:2]]
    rest = probs.clone()
    rest[order[:2]] = 0
    drawn = choice[:, 2].bincount(minlength=8) / 3000
    assert_close(drawn.double(), rest / rest.sum(), rtol=0, atol=0.03)
    assert moe.eval().route(x).notes["choice"][:, 2].unique().tolist() == [order[2]]
    with pytest.raises(ValueError, match="sampled=4 must be between 0 and top_k=3"):
        lively(method, top_k=3, sampled=4)


# ---- gating-dropout


@entry("gating-dropout")
def test_gating_dropout_skips_the_layer_or_stays_at_home(method):
    x = tokens()
    assert torch.equal(lively(method, rate=0.0)(x), lively(method, rate=0.0).eval()(x))
    assert not lively(method, rate=1.0)(x).any(), "only the residual remains"
    moe = lively(method, rate=1.0, num_devices=4)
    local, usual = moe.train().route(x), moe.eval().route(x)
    served = local.routing.combine_matrix().argmax(1)
    assert (served // 2).tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert torch.equal(served % 2, usual.notes["choice"][:, 0] % 2)
    assert torch.equal(local.notes["choice"], usual.notes["choice"]), "losses count what the gate wanted"
    assert_close(local.routing.combine_matrix().sum(1), usual.routing.combine_matrix().sum(1))
    with pytest.raises(ValueError, match="num_devices=1 has no effect"):
        lively(method, num_devices=1)


@entry("gating-dropout")
def test_gating_dropout_happens_at_its_rate(method):
    moe, x = lively(method, rate=0.3), tokens(2)
    torch.manual_seed(0)
    skipped = sum(not moe(x).any() for _ in range(500)) / 500
    assert 0.24 < skipped < 0.36


# ---- residual-moe, cmr


@entry("residual-moe")
def test_residual_moe_shares_out_by_a_softmax(method):
    moe, x = lively(method, capacity_factor=9.0), tokens()
    c = torch.stack([share(moe.router.weight @ x[t] + moe.router.bias) for t in range(12)])
    inner = moe.router.router(x)
    expected = c[:, :1] * moe.experts.run(x, inner.routing) + c[:, 1:] * moe.shared(x)
    assert_close(moe(x), expected)
    fresh = moestro.build(method, width=6, hidden=3, num_experts=8)
    decision = fresh.route(torch.randn(4, 6))
    assert_close(decision.notes["shared_weight"], torch.full((4,), 0.5))


@entry("cmr")
def test_cmr_mixes_and_keeps_to_its_budget(method):
    moe, x = lively(method, gate_dropout=0.0), tokens()
    valid = torch.arange(12) % 4 > 0
    g = 1 / (1 + torch.exp(-(x @ moe.router.weight[0] + moe.router.bias)))
    routed = moe.experts.run(x, moe.router.router(x).routing)
    assert_close(moe(x), (1 - g[:, None]) * moe.shared(x) + g[:, None] * routed)
    loss = moe.losses["budget"][1]
    assert_close(loss(moe.route(x, Context(valid=valid))), (g[valid].mean() - 0.8).abs())
    torch.nn.init.zeros_(moe.router.weight)
    torch.nn.init.constant_(moe.router.bias, math.log(4))  # sigmoid 0.8 everywhere
    assert_close(loss(moe.route(x)), 0 * ONE)
    with pytest.raises(ValueError, match=r"budget=1\.5"):
        lively(method, budget=1.5)


@entry("cmr")
def test_cmr_a_dropped_gate_leaves_the_shared_network(method):
    moe, x = lively(method, gate_dropout=0.5).train(), tokens(40)
    decision = moe.route(x)
    dropped = decision.notes["shared_weight"] == 1
    assert 5 < int(dropped.sum()) < 35
    assert_close(moe.run(x, decision)[dropped], moe.shared(x[dropped]))
    g = torch.sigmoid(x @ moe.router.weight[0] + moe.router.bias)
    assert_close(1 - decision.notes["shared_weight"][~dropped], 2 * g[~dropped])


# ---- tutel-top-any


@entry("tutel-top-any")
def test_tutel_top_any_with_all_experts_is_the_dense_mixture(method):
    moe, x = lively(method, top_k=8), tokens()
    assert_close(moe.route(x).routing.combine_matrix(), (x @ moe.router.scorer.weight.T).softmax(-1))


@entry("tutel-top-any")
def test_tutel_top_any_capacity_and_k_at_run_time(method):
    x = torch.ones(20, 6, dtype=torch.float64)
    assert int(lively(method).route(x).routing.load().max()) == 20, "a factor of 0 drops nothing"
    for factor in (1.5, -1.5):
        moe = lively(method, capacity_factor=factor)
        assert int(moe.route(x).routing.load().max()) == 2 * int(1.5 * 3)
        moe.router.select.k = 3
        assert int(moe.route(x).routing.load().max()) == 3 * int(1.5 * 3)
        assert moe.route(x).notes["choice"].shape == (20, 3)


@entry("tutel-top-any")
def test_tutel_top_any_weighing_inputs_is_another_function(method):
    x = tokens()
    after, before = lively(method), lively(method, weigh="input")
    assert not torch.allclose(after(x), before(x))
    assert_close(after.route(x).routing.combine_matrix(), before.route(x).routing.combine_matrix())
    one = lively(method, top_k=1).route(x)
    assert_close(one.routing.combine_matrix().amax(1), one.probs.amax(1), msg="one weight stays raw")
    assert lively(method, scores="cosine").route(x).logits.abs().max() <= 1


# ---- adaptive-gating


@entry("adaptive-gating")
@pytest.mark.parametrize("margin", [0.0, 0.3, 1.0])
def test_adaptive_gating_routes_and_loses_by_its_equations(method, margin):
    def slow(x, p):
        probs = [share(x[t] @ p["scorer.weight"].T) for t in range(len(x))]
        rows, single = [], []
        for q in probs:
            a, b = best(q, 2)
            if float((q[a] - q[b]).detach()) <= margin:
                rows.append({a: q[a] / (q[a] + q[b]), b: q[b] / (q[a] + q[b])})
            else:
                rows.append({a: q[a]})
                single.append([a])
        return rows, {"balance": counts_times_probability(probs, single, max(len(single), 1))}

    decision = same_routing(lively(method, margin=margin), slow)
    average = int(decision.routing.load().sum()) / 12
    assert average == {0.0: 1.0, 1.0: 2.0}.get(margin, average)
    assert 1 <= average <= 2


@entry("adaptive-gating")
def test_adaptive_gating_uses_more_experts_with_a_wider_margin(method):
    loads = [
        int(lively(method, margin=m).route(tokens(100)).routing.load().sum()) for m in (0.0, 0.2, 0.5, 0.9, 1.0)
    ]
    assert loads == sorted(loads)
    assert loads[0] < loads[2] < loads[4]


# ---- locmoe


@entry("locmoe")
def test_locmoe_gate_is_the_mean_of_blocks_without_parameters(method):
    gate = BlockMeans(12, 4)
    x = tokens(5, 12)
    assert_close(gate(x), x.view(5, 4, 3).mean(-1).clamp(min=0))
    product = gate.gate @ gate.gate.T
    assert_close(product, torch.diag(product.diagonal()))
    moe = lively(method, num_experts=4, width=12)
    assert not list(moe.router.parameters())
    mass = torch.zeros(1, 12, dtype=torch.float64)
    mass[0, 6:9] = 1
    assert moe.route(mass).notes["choice"].tolist() == [[2]]
    decision = moe.route(x)
    assert_close(decision.probs, gate(x).softmax(-1))
    with pytest.raises(ValueError, match="width=6 has no block for each of 8 experts"):
        lively(method)


@entry("locmoe")
def test_locmoe_capacity_grows_with_the_angle(method):
    exact = 64 / 4 / math.erfc(math.sqrt(0.1**2 * 12 / (2 - 0.1**2)))
    assert locmoe_slots(64, 4, 12, 0.1) == math.ceil(exact)
    slots = [locmoe_slots(1000, 8, 512, delta) for delta in (0.0, 0.03, 0.05, 0.5)]
    assert slots == sorted(slots)
    assert slots[0] == 125
    assert slots[-1] == 1000
    for delta in (0.03, 0.05):  # the paper's simpler bound lies below
        bound = math.exp(delta**2 * 512 / (2 - delta**2)) * 1000 / 8
        assert locmoe_slots(10**6, 8, 512, delta) > bound


@entry("locmoe")
def test_locmoe_locality_is_least_at_home(method):
    moe = lively(method, num_experts=4, width=12, num_devices=2, locality=0.1)
    loss, decision = moe.losses["locality"][1], moe.route(tokens(8, 12))
    home = torch.tensor([[0.5, 0.5, 0, 0]] * 4 + [[0, 0, 0.5, 0.5]] * 4)

    def value(probs):
        return float(loss(type(decision)(decision.routing, None, probs, decision.notes)))

    assert value(home) == pytest.approx(-math.log(0.995), rel=1e-5)
    assert value(home.flip(0)) == pytest.approx(-math.log(0.005), rel=1e-5)
    even = torch.full((8, 4), 0.25)
    assert value(even) == pytest.approx(0.5 * math.log(0.5 / 0.995) + 0.5 * math.log(0.5 / 0.005), rel=1e-5)
    with pytest.raises(ValueError, match="locality cannot act on num_devices=1"):
        lively(method, num_experts=4, width=12, locality=0.1)


# ---- smile


@entry("smile")
def test_smile_routes_and_loses_by_its_equations(method):
    def slow(x, p):
        rows, node_p, place_p, node, place = [], [], [], [], []
        for t in range(len(x)):
            u, v = share(p["scorer.node"] @ x[t]), share(p["scorer.place"] @ x[t])
            i, j = best(u, 1)[0], best(v, 1)[0]
            rows.append({4 * i + j: u[i] * v[j]})
            for each, value in zip((node_p, place_p, node, place), (u, v, [i], [j]), strict=True):
                each.append(value)
        return rows, {
            "node_balance": counts_times_probability(node_p, node, len(x)),
            "place_balance": counts_times_probability(place_p, place, len(x)),
        }

    moe = lively(method, num_nodes=2, capacity_factor=9.0)
    same_routing(moe, slow)
    assert sum(p.numel() for p in moe.router.parameters()) == (2 + 4) * 6


@entry("smile")
@pytest.mark.parametrize("num_nodes", [1, 8])
def test_smile_with_one_level_is_switch(method, num_nodes):
    moe, switch = lively(method, num_nodes=num_nodes, capacity_factor=9.0), lively("switch", jitter=0.0).train()
    level = moe.router.scorer.place if num_nodes == 1 else moe.router.scorer.node
    switch.router.scorer.scorer.weight.data.copy_(level)
    x = tokens()
    assert_close(moe.route(x).routing.combine_matrix().amax(1), switch.route(x).probs.amax(1))
    assert torch.equal(moe.route(x).notes["choice"], switch.route(x).notes["choice"])


@entry("adaptive-gating")
def test_adaptive_gating_without_a_margin_still_takes_both_of_a_tie(method):
    moe = lively(method, margin=0.0)
    torch.nn.init.zeros_(moe.router.scorer.weight)
    matrix = moe.route(tokens()).routing.combine_matrix()
    assert_close(matrix, torch.tensor([0.5, 0.5, 0, 0, 0, 0, 0, 0], dtype=torch.float64).expand(12, 8))
