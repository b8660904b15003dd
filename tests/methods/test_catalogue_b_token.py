"""Checks of the catalogue: masks, random drops, deployment, searched layers, distilled and rewarded routers."""

import math

import pytest
import torch
from torch.testing import assert_close

import moestro
from moestro.balance import RoutingLog
from moestro.balance.distilled import distillation, signed_overload
from moestro.balance.policy import policy_loss
from moestro.routers import Dropless
from moestro.routers.masks import DropAtRandom, OutputMask
from moestro.routing import Context, Selection


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


# zcode-m3


def test_zcode_m3_keeps_every_token_of_a_full_expert_equally_often():
    drop, draws = DropAtRandom(lambda tokens, experts: 3), 3000
    index = torch.tensor([0, 0, 1, 0, 0, 0, 0, 1]).unsqueeze(1)
    kept = torch.zeros(8)
    for _ in range(draws):
        keep = drop(Selection(index), torch.ones(8, 1), 2, Context()).keep[:, 0]
        assert int(keep[index[:, 0] == 0].sum()) == 3
        kept += keep
    share = (kept / draws).tolist()
    for t in range(8):
        assert abs(share[t] - (3 / 6 if index[t] == 0 else 1.0)) < 4 * math.sqrt(0.25 / draws)


def test_zcode_m3_padding_takes_no_place_and_evaluation_keeps_the_earliest():
    drop = DropAtRandom(lambda tokens, experts: 2)
    chosen = Selection(
        torch.zeros(5, 1, dtype=torch.long), torch.tensor([[True], [False], [True], [False], [True]])
    )
    keep = drop(chosen, torch.ones(5, 1), 1, Context()).keep[:, 0]
    assert int(keep.sum()) == 2
    assert not keep[[1, 3]].any()
    assert drop.eval()(chosen, torch.ones(5, 1), 1, Context()).keep[:, 0].tolist() == [
        True,
        False,
        True,
        False,
        False,
    ]


def test_zcode_m3_has_the_slots_of_the_released_code_and_raw_weights():
    moe, x = layer("zcode-m3", jitter=0.0, min_capacity=1), tokens(18)
    decision = moe.route(x)
    p = (x @ moe.router.scorer.scorer.weight.T).softmax(1)
    kept = decision.notes["kept"][:, 0]
    counts = p.argmax(1).bincount(minlength=4)
    assert decision.routing.load().tolist() == counts.clamp(max=math.ceil(18 / 4)).tolist()
    assert_close(decision.routing.combine_matrix().sum(1), p.amax(1) * kept)
    assert moe.eval().route(x).routing.load().tolist() == counts.clamp(max=9).tolist()


# eom-fom


def test_eom_fom_training_output_averages_to_the_evaluation_output():
    for options in ({"eom": 0.3, "fom": 0.0}, {"eom": 0.0, "fom": 0.3}, {"eom": 0.2, "fom": 0.2}):
        moe, x = layer("eom-fom", **options), tokens(3)
        with torch.no_grad():
            mean = moe(x.repeat(4000, 1)).view(4000, 3, 5).mean(0)
            expected = moe.eval()(x)
        assert_close(mean, expected, atol=0.05 * float(expected.abs().max()), rtol=0)


def test_eom_fom_evaluation_scales_and_training_does_not():
    moe, x = layer("eom-fom", eom=0.2, fom=0.5), tokens(5)
    p = (x @ moe.router.scorer.weight.T).softmax(1)
    best = p.sort(dim=1, descending=True, stable=True)
    share = best.values[:, :2] / best.values[:, :2].sum(1, keepdim=True)
    full = torch.zeros_like(p).scatter(1, best.indices[:, :2], share)
    matrix = moe.route(x).routing.combine_matrix()
    assert_close(matrix, full * (matrix != 0))
    assert_close(moe.eval().route(x).routing.combine_matrix(), full * 0.8 * 0.5)


def test_eom_fom_masks_pairs_or_whole_tokens():
    index, weight = torch.tensor([[0, 1]]).expand(2000, 2), torch.ones(2000, 2)
    pairs = OutputMask(Dropless(), 0.4)(Selection(index), weight, 2, Context()).keep
    whole = OutputMask(Dropless(), 0.4, whole_token=True)(Selection(index), weight, 2, Context()).keep
    assert abs(float(pairs.double().mean()) - 0.6) < 0.03
    assert abs(float((pairs[:, 0] & pairs[:, 1]).double().mean()) - 0.36) < 0.04, "pairs are independent"
    assert torch.equal(whole[:, 0], whole[:, 1])
    assert abs(float(whole.double().mean()) - 0.6) < 0.04
    with pytest.raises(ValueError, match=r"a mask of probability 1\.0 must be"):
        OutputMask(Dropless(), 1.0)


def test_eom_fom_are_one_for_single_choices():
    moe, x = layer("eom-fom", top_k=1, eom=0.4), tokens(6)
    other = layer("eom-fom", top_k=1, eom=0.0, fom=0.4)
    other.load_state_dict(moe.state_dict())
    outputs = []
    for each in (moe, other):
        with torch.no_grad():
            draws = each(x[:1].repeat(3000, 1))
        full = draws[draws.any(1)]
        assert_close(full, full[:1].expand_as(full))
        outputs.append((full[0], float(draws.any(1).double().mean())))
    assert_close(outputs[0][0], outputs[1][0])
    assert abs(outputs[0][1] - outputs[1][1]) < 0.05
    assert_close(moe.eval()(x), other.eval()(x))


# dynamic-gating-deploy


def test_dynamic_gating_deploy_equals_static_gating_with_room_for_all():
    moe, static, x = layer("dynamic-gating-deploy"), layer("gshard-top2", capacity_factor=4.0), tokens(20)
    static.load_state_dict(moe.state_dict())
    assert_close(moe.eval()(x), static.eval()(x), msg="4 ceil(T / E) = T slots")
    tight = layer("gshard-top2", capacity_factor=0.5, second="all")
    tight.load_state_dict(moe.state_dict())
    moe.train().router.capacity.capacity.train_slots = tight.router.capacity.train_slots
    assert_close(moe(x), tight(x), msg="training keeps the capacity")


def test_dynamic_gating_deploy_computes_exactly_k_pairs_per_token():
    moe, x = layer("dynamic-gating-deploy", capacity_factor=0.5), tokens(21)
    assert len(moe.route(x).routing.token) < 42
    assert len(moe.eval().route(x).routing.token) == 42
    assert moe.causal_evaluation


# automoe, brainformer


def test_automoe_of_equal_experts_is_switch():
    x, switch = tokens(12), layer("switch")
    auto = layer("automoe")
    auto.load_state_dict(switch.state_dict())
    assert torch.equal(auto.eval()(x), switch.eval()(x))


def test_automoe_experts_of_many_sizes():
    moe, x = layer("automoe", hidden_sizes=[1, 7, 2, 4], eval_capacity_factor=4.0).eval(), tokens(9)
    decision = moe.route(x)
    banks = moe.experts.banks
    for t, e in enumerate(decision.notes["choice"].flatten().tolist()):
        assert banks[e].hidden == [1, 7, 2, 4][e]
        expected = decision.probs[t, e] * ((x[t] @ banks[e].up[0]).relu() @ banks[e].down[0])
        assert_close(moe(x)[t], expected)
    with pytest.raises(ValueError, match="hidden_sizes names 2 experts but there are 4"):
        layer("automoe", hidden_sizes=[1, 2])


@pytest.mark.parametrize(("gating", "name"), [("token", "gshard-top2"), ("expert", "expert-choice")])
def test_brainformer_uses_the_standard_routers(gating, name):
    moe, standard, x = layer("brainformer", gating=gating), layer(name), tokens(12)
    standard.load_state_dict(moe.state_dict())
    assert torch.equal(moe.eval()(x), standard.eval()(x))
    assert list(moe.losses) == list(standard.losses)
    with pytest.raises(ValueError, match=r"balance=0\.1 has no effect on gating='expert'"):
        layer("brainformer", gating="expert", balance=0.1)


# stablemoe


def stable(**options):
    return layer("stablemoe", vocab_size=11, light_width=3, capacity_factor=4.0, **options)


def test_stablemoe_stage_one_is_greedy_and_mixes_with_the_identity():
    moe, x, ids = stable(), tokens(9), torch.arange(9)
    s = x @ moe.router.centroid.T
    decision = moe.route(x, Context(token_ids=ids))
    assert torch.equal(decision.notes["choice"][:, 0], s.argmax(1))
    y = moe(x, Context(token_ids=ids))
    for t in range(9):
        e = int(s[t].argmax())
        alpha = s[t, e].sigmoid()
        residual_block = x[t] + one(moe, e, x[t])
        assert_close(x[t] + y[t], alpha * residual_block + (1 - alpha) * x[t])


def test_stablemoe_losses_follow_their_equations():
    moe, x, ids = stable(), tokens(9), torch.arange(9)
    valid = ids != 4
    decision = moe.route(x, Context(token_ids=ids, valid=valid))
    s, light = x @ moe.router.centroid.T, moe.router.embedding[ids] @ moe.router.light_centroid.T
    choice = s.argmax(1)
    load = [int(((choice == e) & valid).sum()) for e in range(4)]
    mean = 8 / 4
    places = [t for t in range(9) if valid[t]]
    overload = sum((load[choice[t]] - mean) / mean * s[t, choice[t]].sigmoid() for t in places) / 8
    taught = sum(-light[t].log_softmax(0)[choice[t]] for t in places) / 8
    assert_close(signed_overload(decision), overload)
    assert_close(distillation(decision), taught)
    by_light = torch.autograd.grad(distillation(decision), moe.router.centroid, allow_unused=True)[0]
    assert by_light is None, "the teacher does not learn from its pupil"


def test_stablemoe_second_stage_routes_every_id_alike_and_is_frozen():
    moe = stable(two_stage_updates=2)
    log = RoutingLog(moe)
    ids = torch.randint(11, (40,))
    for _ in range(2):
        with log.recording():
            moe(tokens(40), Context(token_ids=ids))
        assert log.auxiliary_loss() > 0
        log.update_controllers()
    seen = {}
    for training in (True, False):
        moe.train(training)
        for _ in range(5):
            x, ids = tokens(40), torch.randint(11, (40,))
            with log.recording():
                y = moe(x, Context(token_ids=ids))
            decision = log.decisions[log.layers[0]][0]
            assert not log.auxiliary_loss().detach().any()
            for token_id, expert in zip(ids.tolist(), decision.notes["choice"][:, 0].tolist(), strict=True):
                assert seen.setdefault(token_id, expert) == expert, "no fluctuation"
            s = x @ moe.router.centroid.T
            weight = s.gather(1, decision.notes["choice"]).sigmoid()
            assert_close(decision.routing.combine_matrix().sum(1), weight[:, 0])
    (y.sum() + log.auxiliary_loss()).backward()
    assert moe.router.embedding.grad is None
    assert moe.router.centroid.grad.any()
    fresh = stable().eval().route(tokens(11), Context(token_ids=torch.arange(11)))
    assert "taught" not in fresh.notes, "evaluation always reads the table"
    with pytest.raises(ValueError, match=r"Context\.token_ids holds 11 but"):
        moe(tokens(2), Context(token_ids=torch.tensor([0, 11])))


# rl-router


def test_rl_router_samples_its_policy_in_training_and_takes_the_best_in_evaluation():
    moe, x = layer("rl-router"), tokens(1).expand(6000, 5)
    decision = moe.route(x)
    share = decision.notes["choice"][:, 0].bincount(minlength=4) / 6000
    assert_close(share.double(), decision.probs[0].detach(), atol=0.03, rtol=0)
    choice = decision.notes["choice"]
    assert_close(decision.routing.combine_matrix().sum(1), decision.probs.gather(1, choice)[:, 0])
    assert torch.equal(moe.eval().route(x).notes["choice"][:, 0], decision.probs.argmax(1))
    unweighted = layer("rl-router", weight="one")
    assert_close(unweighted.route(x).routing.combine_matrix().sum(1), torch.ones(6000, dtype=torch.float64))


def test_rl_router_perfect_baseline_gives_the_policy_no_gradient():
    moe, x = layer("rl-router"), tokens(8)
    decision = moe.route(x)
    loss = policy_loss([decision], decision.notes["value"].detach())
    assert_close(loss, loss * 0)
    assert not torch.autograd.grad(loss, moe.router.scorer.weight)[0].any()


def test_rl_router_gradient_is_advantage_times_score():
    moe, x, reward = layer("rl-router"), tokens(6), torch.randn(6, dtype=torch.float64)
    valid = torch.arange(6) != 2
    decision = moe.route(x, Context(valid=valid))
    probs, choice, value = decision.probs, decision.notes["choice"][:, 0], decision.notes["value"]
    loss = policy_loss([decision, decision], reward)
    by_policy, by_value = torch.autograd.grad(loss, (moe.router.scorer.weight, moe.router.value.weight))
    expected, slope = torch.zeros(4, 5, dtype=torch.float64), torch.zeros(1, 5, dtype=torch.float64)
    for t in range(6):
        if valid[t]:
            one_hot = torch.eye(4, dtype=torch.float64)[choice[t]]
            advantage = reward[t] - value[t]
            expected -= 2 / 5 * advantage * torch.outer(one_hot - probs[t], x[t])
            slope -= 2 / 5 * advantage.clamp(-1, 1) * x[t]  # Huber
    assert_close(by_policy, expected.detach())
    assert_close(by_value, slope.detach())


def test_rl_router_learns_the_rewarded_expert():
    moe, x = layer("rl-router"), tokens(1).expand(64, 5)
    optimiser = torch.optim.Adam(moe.router.parameters(), 0.1)
    for _ in range(120):
        decision = moe.route(x)
        reward = (decision.notes["choice"][:, 0] == 2).double()
        optimiser.zero_grad()
        policy_loss([decision], reward, normalise=True).backward()
        optimiser.step()
    assert float(moe.route(x).probs[0, 2].detach()) > 0.95


def test_rl_router_entropy_keeps_the_policy_open_and_rewards_must_fit():
    moe, x = layer("rl-router"), tokens(5)
    decision = moe.route(x)
    reward = decision.notes["value"].detach()
    p = decision.probs
    assert_close(policy_loss([decision], reward, entropy=0.5), 0.5 * (p * p.log()).sum(1).mean())
    with pytest.raises(ValueError, match=r"reward has shape \[3\]; pass one per token, \[5\]"):
        policy_loss([decision], torch.zeros(3))
    with pytest.raises(ValueError, match="need a Policy router"):
        policy_loss([layer("expert-choice").route(x)], torch.zeros(5))
