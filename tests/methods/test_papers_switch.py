"""Switch against its equations: Fedus et al. 2021."""

import math

import pytest
import torch
from oracles import papers
from oracles.harness import build, check_layer, random_case
from torch.testing import assert_close

import moestro
from moestro.routing import Context


def switch(**options):
    sizes = {"width": 5, "hidden": 4, "num_experts": 3, "jitter": 0.0, "capacity_factor": 8.0} | options
    return moestro.build("switch", **sizes).double()


@pytest.mark.parametrize("seed", range(42))
def test_switch_follows_its_equations(seed):
    case = random_case(seed)
    train, evaluate, least = [(1.25, 2.0, 4), (0.5, 1.0, 1), (1.0, 0.4, 0)][seed % 3]
    layer = build(
        "switch", case, capacity_factor=train, eval_capacity_factor=evaluate, min_capacity=least, jitter=0.0
    )
    factor = train if layer.training else evaluate
    capacity = papers.switch_capacity(factor, case.num_valid, case.num_experts, least)
    if capacity == 0 and case.num_valid:
        with pytest.raises(ValueError, match="keeps nothing"):
            layer(case.x, case.context)
        return
    router = layer.router.scorer.scorer.weight

    def slow(twin, x, _):
        return papers.switch(x, twin(router), twin.experts, capacity, case.valid_list)

    check_layer(layer, case, slow)


@pytest.mark.parametrize("seed", [1, 5, 6, 7, 8, 10])
def test_switch_jitters_what_the_router_sees_and_nothing_else(seed):
    case = random_case(seed)
    layer = build("switch", case, capacity_factor=9.0, jitter=0.2).train()
    seen = []
    layer.router.scorer.scorer.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))

    def slow(twin, x, _):
        factor = seen[0] / case.x
        real = factor[torch.tensor(case.valid_list, dtype=torch.bool)]  # the router sees padding as zeros
        assert bool(((real - 1).abs() <= 0.2 + 1e-9).all())
        assert real.numel() < 2 or bool((real != real.flatten()[0]).any())
        return papers.switch(
            x, twin(layer.router.scorer.scorer.weight), twin.experts, math.inf, case.valid_list, x * factor
        )

    check_layer(layer, case, slow)


def test_switch_jitter_is_off_in_evaluation():
    layer, x = switch(jitter=0.5).eval(), torch.randn(6, 5, dtype=torch.float64)
    assert_close(layer(x), layer(x), rtol=0, atol=0)
    assert_close(layer.route(x).logits, x @ layer.router.scorer.scorer.weight.T)


def test_switch_with_one_expert_is_that_expert():
    layer, x = switch(num_experts=1), torch.randn(6, 5, dtype=torch.float64)
    assert_close(layer(x), layer.experts(x, torch.tensor([0, 6])), rtol=0, atol=1e-15)


def test_switch_gradient_of_router_is_not_zero():
    layer, x = switch(), torch.randn(6, 5, dtype=torch.float64)
    layer(x).sum().backward()
    assert float(layer.router.scorer.scorer.weight.grad.abs().sum()) > 1e-6


def test_switch_loss_is_one_at_uniform():
    layer, x = switch(balance=0.5), torch.randn(6, 5, dtype=torch.float64)
    layer.router.scorer.scorer.weight.data.zero_()
    coefficient, loss = layer.losses["balance"]
    assert coefficient == 0.5
    assert_close(loss(layer.route(x)), torch.tensor(1.0, dtype=torch.float64))


def test_switch_counts_for_the_loss_before_dropping():
    layer, x = switch(capacity_factor=0.01, min_capacity=1), torch.randn(9, 5, dtype=torch.float64)
    roomy, loss = switch(), layer.losses["balance"][1]
    roomy.load_state_dict(layer.state_dict())
    assert int(layer.route(x).routing.load().sum()) < 9
    assert_close(loss(layer.route(x)), loss(roomy.route(x)))


def test_switch_over_capacity_tokens_get_nothing():
    layer, x = switch(capacity_factor=0.01, min_capacity=2), torch.randn(1, 5, dtype=torch.float64).repeat(5, 1)
    assert layer(x).abs().sum(1).gt(0).tolist() == [True, True, False, False, False]


@pytest.mark.parametrize(
    ("factor", "num_tokens", "num_experts", "slots"),
    [(1.25, 64, 8, 10), (1.25, 100, 8, 15), (1.0, 8, 8, 4), (2.0, 3, 1, 4), (9.0, 40, 2, 40)],
)
def test_switch_capacity_on_paper(factor, num_tokens, num_experts, slots):
    """int(CF T / E), at most T, then at least 4; all tokens want one expert, so the load is the capacity."""
    layer = switch(num_experts=num_experts, capacity_factor=factor).train()
    x = torch.ones(num_tokens, 5, dtype=torch.float64)
    assert int(layer.route(x).routing.load().max()) == min(slots, num_tokens)


def test_switch_evaluates_with_twice_the_even_load():
    layer, x = switch(capacity_factor=1.25, num_experts=8), torch.ones(64, 5, dtype=torch.float64)
    assert int(layer.train().route(x).routing.load().max()) == 10
    assert int(layer.eval().route(x).routing.load().max()) == 16


def test_switch_ties_go_to_the_first_expert_and_padding_takes_no_place():
    layer, x = switch(capacity_factor=0.01, min_capacity=1), torch.randn(4, 5, dtype=torch.float64)
    layer.router.scorer.scorer.weight.data.zero_()
    decision = layer.route(x, Context(valid=torch.tensor([False, True, True, True])))
    assert decision.notes["choice"].tolist() == [[0]] * 4
    assert decision.notes["kept"].tolist() == [[False], [True], [False], [False]]
