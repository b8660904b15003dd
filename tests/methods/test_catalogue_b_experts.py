"""Checks of the catalogue: experts choose tokens (capped, patches, plans, depth)."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch.testing import assert_close

import moestro
from moestro.routers.groups import CappedShare, EachSequence, Fixed
from moestro.routers.plans import BySinkhorn, Capped, SparsityConstrained, sinkhorn, sparse_projection
from moestro.routing import Context


def layer(name, num_experts=4, **options):
    moe = moestro.build(name, width=5, hidden=3, num_experts=num_experts, activation="relu", **options).double()
    with torch.no_grad():
        for parameter in moe.router.parameters():
            parameter.normal_(0, 0.5)
    return moe


def tokens(count):
    return torch.randn(count, 5, dtype=torch.float64)


def matrix_of(moe, x, **context):
    return moe.route(x, Context(**context)).routing.combine_matrix()


# expert-choice-capped


def scores_of(num_tokens, num_experts):
    return torch.randn(num_tokens, num_experts, dtype=torch.float64).softmax(1)


def test_expert_choice_capped_without_a_binding_cap_is_expert_choice():
    capped, plain, x = layer("expert-choice-capped", max_experts=4), layer("expert-choice"), tokens(12)
    plain.router.load_state_dict(capped.router.state_dict())
    assert_close(matrix_of(capped, x), matrix_of(plain, x))


def test_expert_choice_capped_plan_keeps_its_constraints():
    for bound, slots in ((2, 6), (3, 9), (3, 6)):
        plan = Capped(bound, entropy=0.02, sweeps=3000)(scores_of(16, 4), slots)
        assert_close(plan.sum(0), torch.full((4,), float(slots), dtype=torch.float64), atol=1e-3, rtol=0)
        assert float(plan.sum(1).max()) <= bound + 1e-3
        assert float(plan.max()) <= 1


@pytest.mark.parametrize("seed", range(5))
def test_expert_choice_capped_plan_is_near_the_linear_program(seed):
    torch.manual_seed(seed)
    num_tokens, num_experts, bound, slots = 8, 4, 2, 4
    scores = scores_of(num_tokens, num_experts)
    flat = scores.numpy().ravel()  # token-major
    columns = np.kron(np.ones((1, num_tokens)), np.eye(num_experts))
    rows = np.kron(np.eye(num_tokens), np.ones((1, num_experts)))
    best = linprog(
        -flat,
        A_ub=rows,
        b_ub=np.full(num_tokens, bound),
        A_eq=columns,
        b_eq=np.full(num_experts, slots),
        bounds=(0, 1),
    )
    plan = Capped(bound, sweeps=1000)(scores, slots)
    assert_close(plan.sum(0), torch.full((num_experts,), float(slots), dtype=torch.float64), atol=1e-3, rtol=0)
    assert_close(float((plan * scores).sum()), -best.fun, atol=1e-3, rtol=0)
    rounded = torch.zeros_like(plan).scatter(0, plan.sort(dim=0, descending=True).indices[:slots], 1.0)
    assert_close(float((rounded * scores).sum()), -best.fun, atol=1e-2, rtol=0)


def test_expert_choice_capped_at_the_average_gives_everyone_the_same_number():
    moe, x = layer("expert-choice-capped", capacity_factor=2.0, max_experts=2, sweeps=1000), tokens(16)
    picked = matrix_of(moe, x) > 0
    assert picked.sum(0).tolist() == [8] * 4
    assert picked.sum(1).tolist() == [2] * 16


def test_expert_choice_capped_bounds_tokens_that_all_experts_want():
    moe, x = layer("expert-choice-capped", 4, capacity_factor=1.0, max_experts=1, sweeps=2000), tokens(16)
    plain = layer("expert-choice", capacity_factor=1.0)
    plain.router.load_state_dict(moe.router.state_dict())
    free, capped = matrix_of(plain, x) > 0, matrix_of(moe, x) > 0
    assert int(free.sum(1).max()) > 1
    assert int(capped.sum(1).max()) == 1
    probs = moe.route(x).probs
    assert_close(matrix_of(moe, x), probs * capped)


def test_expert_choice_capped_refuses_what_has_no_solution():
    with pytest.raises(ValueError, match=r"no assignment gives a token 3\.0 experts on average and at most 2"):
        layer("expert-choice-capped", capacity_factor=3.0, max_experts=2)
    with pytest.raises(ValueError, match="entropy must be above 0"):
        layer("expert-choice-capped", entropy=0.0)
    assert [CappedShare(1.0, 1)(n, 4) for n in (0, 3, 4, 9)] == [0, 0, 1, 2], "never more slots than fit"


# pmoe-patch


def test_pmoe_patch_weighs_the_picked_patches_of_each_sample_by_a_softmax():
    moe, x = layer("pmoe-patch", patches=2), tokens(12)
    sequence, valid = torch.arange(12) // 6, torch.arange(12) != 3
    matrix = matrix_of(moe, x, sequence=sequence, valid=valid).detach()
    scores = (x @ moe.router.scorer.weight.T).detach()
    expected = torch.zeros(12, 4, dtype=torch.float64)
    for n in range(2):
        mine = [t for t in range(12) if sequence[t] == n and valid[t]]
        for e in range(4):
            best = sorted(mine, key=lambda t: -float(scores[t, e]))[:2]
            total = sum(scores[t, e].exp() for t in best)
            for t in best:
                expected[t, e] = scores[t, e].exp() / total
    assert_close(matrix, expected)
    for n in range(2):
        assert_close(matrix[sequence == n].sum(0), torch.ones(4, dtype=torch.float64))


def test_pmoe_patch_fixed_router_with_all_patches_averages_them():
    moe, x = layer("pmoe-patch", patches=6, training="separate"), tokens(6)
    assert_close(matrix_of(moe, x), torch.full((6, 4), 1 / 6, dtype=torch.float64))
    assert not moe.router.scorer.weight.requires_grad
    few = layer("pmoe-patch", patches=2, training="separate")
    assert sorted(matrix_of(few, x).unique().tolist()) == [0.0, 0.5]


def test_pmoe_patch_samples_do_not_compete():
    moe, x = layer("pmoe-patch", patches=3), tokens(12)
    alone = matrix_of(moe, x[:6])
    assert_close(matrix_of(moe, x, sequence=torch.arange(12) // 6)[:6], alone)
    groups = EachSequence()(Context(sequence=torch.tensor([4, 4, 1])), 3, torch.device("cpu"))
    assert [places.tolist() for places in groups] == [[2], [0, 1]]
    with pytest.raises(ValueError, match="0 slots keep nothing; pass at least 1"):
        Fixed(0, 1.0)


# routers-vision-study


def test_routers_vision_study_sinkhorn_rows_and_columns():
    logits = torch.randn(12, 4, dtype=torch.float64)
    plan = sinkhorn(logits, 200).exp()
    assert_close(plan.sum(1), torch.ones(12, dtype=torch.float64))
    assert_close(plan.sum(0), torch.full((4,), 3.0, dtype=torch.float64))
    assert_close(sinkhorn(logits, 20).exp().sum(1), torch.ones(12, dtype=torch.float64))
    assert_close(sinkhorn(logits.log_softmax(1) + torch.randn(4), 200).exp(), plan), "potentials are absorbed"
    ratio = (plan / logits.exp()).log()  # a plan of this form is the optimum
    assert_close(ratio, ratio[:, :1] + ratio[:1] - ratio[0, 0])


def test_routers_vision_study_sparse_plan_has_few_entries_and_even_columns():
    scores = torch.randn(12, 4, dtype=torch.float64).softmax(1)
    plan = SparsityConstrained(iterations=2000, rate=1e-2)(scores, 5)
    assert ((plan > 0).sum(0) <= 5).all()
    assert_close(plan.sum(0), torch.full((4,), 3.0, dtype=torch.float64))
    assert float((plan.sum(1) - 1).abs().mean()) < 0.25
    start = sparse_projection(scores.t(), 3.0, 5).t()
    assert float((plan.sum(1) - 1).abs().sum()) < float((start.sum(1) - 1).abs().sum())


def test_routers_vision_study_projection_is_the_nearest_sparse_point():
    scores = torch.randn(6, 5, dtype=torch.float64)
    point = sparse_projection(scores, 2.0, 3)
    assert_close(point.sum(1), torch.full((6,), 2.0, dtype=torch.float64))
    assert (point >= 0).all()
    assert ((point > 0).sum(1) <= 3).all()
    value = (scores * point - point**2 / 2).sum(1)
    for _ in range(300):
        other = torch.zeros(6, 5, dtype=torch.float64)
        where = torch.rand(6, 5).argsort(1)[:, :3]
        share = torch.rand(6, 3, dtype=torch.float64)
        other.scatter_(1, where, 2 * share / share.sum(1, keepdim=True))
        assert (value >= (scores * other - other**2 / 2).sum(1) - 1e-12).all()


@pytest.mark.parametrize(
    ("chooser", "affinity"),
    [
        ("expert", "softmax"),
        ("expert", "sinkhorn"),
        ("expert", "sparse"),
        ("token", "softmax"),
        ("token", "sinkhorn"),
    ],
)
def test_routers_vision_study_plans_choose_and_softmax_weighs(chooser, affinity):
    moe, x = layer("routers-vision-study", chooser=chooser, affinity=affinity), tokens(16)
    valid = torch.arange(16) % 5 != 0
    decision = moe.route(x, Context(valid=valid))
    matrix, inner = decision.routing.combine_matrix(), x[valid]
    probs = (inner @ moe.router.scorer.weight.T).softmax(1)
    slots = 12 * 2 // 4
    plan = {
        "softmax": probs,
        "sinkhorn": sinkhorn(probs.log()).exp(),
        "sparse": SparsityConstrained()(probs, slots),
    }[affinity]
    axis, count = (0, slots) if chooser == "expert" else (1, 2)
    chosen = torch.zeros_like(probs)
    best = plan.sort(dim=axis, descending=True, stable=True).indices
    chosen.scatter_(axis, best[:count] if axis == 0 else best[:, :count], 1.0)
    assert_close(matrix[valid], probs * chosen)
    assert not matrix[~valid].any()


def test_routers_vision_study_padding_has_no_part_in_the_plan():
    moe, x = layer("routers-vision-study", chooser="token", affinity="sinkhorn", top_k=1), tokens(60) + 1
    valid = torch.arange(60) < 20
    assert_close(matrix_of(moe, x, valid=valid)[:20], matrix_of(moe, x[:20]))
    select, scores = moe.router.select, torch.rand(60, 4, dtype=torch.float64)
    scores[20:, 0] = 50.0  # padding may score anything
    alone = select(scores[:20]).index
    assert torch.equal(select(scores, Context(valid=valid)).index[:20], alone)
    assert not torch.equal(select(scores).index[:20], alone)


def test_routers_vision_study_sinkhorn_evens_the_load_and_sees_all_tokens():
    x = tokens(64) + 1
    plain, planned = (layer("routers-vision-study", chooser="token", affinity=a) for a in ("softmax", "sinkhorn"))
    planned.router.load_state_dict(plain.router.state_dict())
    spread = [float(moe.route(x).routing.load().double().std()) for moe in (plain, planned)]
    assert spread[1] < spread[0]
    assert (plain.causal, plain.batch_independent) == (True, True)
    assert (planned.causal, planned.batch_independent) == (False, False)
    with pytest.raises(ValueError, match="use it with chooser='expert'"):
        layer("routers-vision-study", chooser="token", affinity="sparse")
    assert_close(BySinkhorn(7)(scores_of(5, 3), 2).sum(1), torch.ones(5, dtype=torch.float64))


# mixture-of-depths


def test_mixture_of_depths_everyone_with_score_one_is_the_plain_block():
    moe, x = layer("mixture-of-depths", 1, capacity=1.0), torch.randn(2, 6, 5, dtype=torch.float64)
    x[..., 0] = 1
    moe.router.weight.data.copy_(torch.tensor([1.0, 0, 0, 0, 0]))
    assert_close(moe(x), (x @ moe.experts.up[0]).relu() @ moe.experts.down[0])


def test_mixture_of_depths_training_passes_the_top_of_each_sequence_by_raw_score():
    moe, x = layer("mixture-of-depths", 1, capacity=0.5), tokens(14)
    sequence, valid = torch.arange(14) // 7, torch.arange(14) % 6 != 2
    score = x @ moe.router.weight
    expected = torch.zeros(14, 5, dtype=torch.float64)
    for n in range(2):
        mine = [t for t in range(14) if sequence[t] == n and valid[t]]
        for t in sorted(mine, key=lambda t: -score[t].item())[: len(mine) // 2]:
            expected[t] = score[t] * ((x[t] @ moe.experts.up[0]).relu() @ moe.experts.down[0])
    assert_close(moe(x, Context(sequence=sequence, valid=valid)), expected)


def test_mixture_of_depths_work_scales_with_the_capacity():
    x = torch.randn(3, 16, 5, dtype=torch.float64)
    for capacity, passed in ((0.125, 2), (0.5, 8), (1.0, 16), (0.01, 1)):
        moe = layer("mixture-of-depths", 1, capacity=capacity)
        sequence = torch.arange(48) // 16
        routing = moe.route(x.flatten(0, 1), Context(sequence=sequence)).routing
        assert sequence[routing.token].bincount().tolist() == [passed] * 3
    for capacity in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"capacity={capacity} is a share"):
            layer("mixture-of-depths", capacity=capacity)


@pytest.mark.parametrize("guess", ["network", "score"])
def test_mixture_of_depths_learns_to_guess_and_evaluates_causally(guess):
    moe, x = layer("mixture-of-depths", 2, capacity=0.25, guess=guess), tokens(256) + 1
    context = Context(sequence=torch.arange(256) // 32)
    if guess == "network":
        inner, outer = moe.router.guess.inner, moe.router.guess.outer
        hidden = (x @ inner.weight.T + inner.bias).relu()
        assert_close(moe.route(x, context).notes["guess"], hidden @ outer.weight[0] + outer.bias)
    optimiser = torch.optim.Adam(moe.router.parameters(), 0.02)
    values = []
    for _ in range(200):
        optimiser.zero_grad()
        decision = moe.route(x, context)
        loss = moe.losses["predictor"][1](decision)
        loss.backward()
        optimiser.step()
        values.append(loss.item())
    if guess == "network":
        assert moe.router.weight.grad is None, "the network learns beside, not through, the scores"
    assert values[-1] < 0.8 * values[0]
    moe.eval()
    assert moe.causal_evaluation
    assert not moe.causal
    evaluated = moe.route(x, context)
    assert torch.equal(evaluated.routing.combine_matrix().any(1), evaluated.notes["guess"] > 0)
    agree = (evaluated.notes["guess"] > 0) == evaluated.notes["picked"]
    assert float(agree.double().mean()) > 0.8


def test_mixture_of_depths_loss_is_the_binary_cross_entropy_of_valid_tokens():
    moe, x, valid = layer("mixture-of-depths", capacity=0.5), tokens(8), torch.arange(8) != 3
    decision = moe.route(x, Context(valid=valid))
    guess, picked = decision.notes["guess"].sigmoid(), decision.notes["picked"]
    each = [-(guess[t] if picked[t] else 1 - guess[t]).log() for t in range(8) if valid[t]]
    assert_close(moe.losses["predictor"][1](decision), sum(each) / 7)
    with pytest.raises(ValueError, match="needs the guesses of a mixture-of-depths router"):
        moe.losses["predictor"][1](layer("expert-choice").route(x))
    assert decision.notes["valid"] is valid
    assert not decision.notes["kept"][3].any()
