"""GShard's top-2 gating against its equations: Lepikhin et al. 2020."""

import math

import pytest
import torch
from oracles import papers
from oracles.harness import build, check_layer, random_case
from torch.testing import assert_close

import moestro


def gshard(**options):
    sizes = {"width": 5, "hidden": 4, "num_experts": 3, "capacity_factor": None} | options
    return moestro.build("gshard-top2", **sizes).double()


@pytest.mark.parametrize("seed", range(42))
def test_gshard_top2_follows_its_equations(seed):
    case = random_case(seed, least_experts=2)
    factor = [2.0, None, 0.7, 1.0][seed % 4]
    layer = build("gshard-top2", case, capacity_factor=factor, second="all")
    num_valid = case.num_valid
    capacity = math.inf if factor is None else papers.gshard_capacity(factor, num_valid, case.num_experts)
    if capacity == 0 and num_valid:
        with pytest.raises(ValueError, match="keeps nothing"):
            layer(case.x, case.context)
        return
    router = layer.router.scorer.weight

    def slow(twin, x, _):
        return papers.gshard(x, twin(router), twin.experts, capacity, case.valid_list)

    check_layer(layer, case, slow)


@pytest.mark.parametrize("seed", range(40))
def test_gshard_top2_draws_whether_the_second_stays(seed):
    case = random_case(seed, least_experts=2)
    factor = [None, 1.0][seed % 2]
    layer = build("gshard-top2", case, capacity_factor=factor, second="random").train()
    capacity = math.inf if factor is None else papers.gshard_capacity(factor, case.num_valid, case.num_experts)
    torch.manual_seed(seed)
    draws = torch.rand(case.num_tokens, dtype=torch.float64).tolist()
    torch.manual_seed(seed)
    router = layer.router.scorer.weight
    check_layer(
        layer,
        case,
        lambda twin, x, _: papers.gshard(x, twin(router), twin.experts, capacity, case.valid_list, draws),
    )


@torch.no_grad()
def test_gshard_top2_second_is_a_probability_and_its_mean_weight_two_g2_squared():
    layer, num_tokens = gshard().train(), 40_000
    layer.router.scorer.weight.data.normal_()
    x = torch.randn(1, 5, dtype=torch.float64).repeat(num_tokens, 1)
    first, second = layer.eval().route(x[:1]).routing.combine_matrix()[0].sort(descending=True).values[:2].tolist()
    assert 0 < second <= 0.5 <= first
    assert first + second == pytest.approx(1, abs=1e-8)
    combine = layer.train().route(x).routing.combine_matrix()
    mean = float(combine.sort(descending=True).values[:, 1].mean())
    deviation = second * math.sqrt(2 * second * (1 - 2 * second) / num_tokens)
    assert mean == pytest.approx(2 * second**2, abs=5 * deviation + 1e-12)


def test_gshard_top2_of_two_experts_is_the_dense_mixture():
    layer, x = gshard(num_experts=2, second="all"), torch.randn(6, 5, dtype=torch.float64)
    decision = layer.route(x)
    first, second = (layer.experts(x, torch.tensor(offsets)) for offsets in ([0, 6, 6], [0, 0, 6]))
    p = decision.probs
    expected = p[:, :1] * first + p[:, 1:] * second
    assert_close(layer(x), expected, rtol=0, atol=1e-8)  # the 1e-9 in the normaliser


def test_gshard_top2_loss_is_one_for_uniform_probabilities():
    layer, x = gshard(), torch.randn(6, 5, dtype=torch.float64)
    layer.router.scorer.weight.data.zero_()
    assert_close(layer.losses["balance"][1](layer.route(x)), torch.tensor(1.0, dtype=torch.float64))


def test_gshard_top2_normalises_before_it_drops():
    """Tokens 0 and 1 fill expert 0; token 2 keeps its small weight on expert 1, not weight one."""
    layer = gshard(width=2, num_experts=2, capacity_factor=1.0, second="all")
    layer.router.scorer.weight.data.copy_(torch.eye(2))
    x = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0]], dtype=torch.float64)  # 2 places each
    share = 1 / (1 + math.exp(2))
    combine = layer.route(x).routing.combine_matrix()
    assert_close(combine[2], torch.zeros(2, dtype=torch.float64))  # both queues are full of tokens 0 and 1
    assert_close(combine[0], torch.tensor([1 - share, share], dtype=torch.float64), rtol=0, atol=1e-8)
    x[1] = torch.tensor([0.0, 2.0])  # expert 0: first choices of 0 and 2; expert 1: of 1, then second of 0
    combine = layer.route(x).routing.combine_matrix()
    assert_close(combine[1], torch.tensor([0, 1 - share], dtype=torch.float64), rtol=0, atol=1e-8)
    assert_close(combine[2], torch.tensor([1 - share, 0], dtype=torch.float64), rtol=0, atol=1e-8)


def test_gshard_top2_first_choices_go_before_second_ones():
    layer = gshard(width=2, num_experts=2, capacity_factor=1.0, second="all")
    layer.router.scorer.weight.data.copy_(torch.eye(2))
    x = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)  # one place each
    assert layer.route(x).notes["kept"].tolist() == [[True, False], [True, False]]


def test_gshard_top2_capacity_is_twice_the_even_load_rounded_up():
    layer, x = gshard(capacity_factor=2.0, num_experts=4), torch.ones(9, 5, dtype=torch.float64)
    layer.router.scorer.weight.data.copy_(torch.tensor([3.0, 2.0, 1.0, 0.0]).view(4, 1).expand(4, 5))
    assert layer.route(x).routing.load().tolist()[0] == 6  # 2 * ceil(9 / 4)


def test_gshard_top2_evaluation_keeps_both():
    layer, x = gshard(second="random").eval(), torch.randn(20, 5, dtype=torch.float64)
    assert int(layer.route(x).routing.load().sum()) == 40
