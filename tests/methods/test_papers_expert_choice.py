"""Expert Choice against its equations: Zhou et al. 2022."""

import pytest
import torch
from oracles import papers
from oracles.experts import run_sparse
from oracles.harness import Twin, build, check_layer, random_case
from torch.testing import assert_close

import moestro
from moestro.routing import Context


def expert_choice(**options):
    sizes = {"width": 5, "hidden": 4, "num_experts": 4, "capacity_factor": 2.0} | options
    layer = moestro.build("expert-choice", **sizes).double()
    layer.router.scorer.weight.data.normal_()
    return layer


def slots_of(num_tokens, factor, num_experts):
    """n c / E, rounded down where it is no integer, at least one."""
    return max(int(num_tokens * factor / num_experts), 1)


@pytest.mark.parametrize("seed", range(42))
def test_expert_choice_follows_its_equations(seed):
    case = random_case(seed)
    factor = min([2.0, 1.0, 0.5, 3.0][seed % 4], case.num_experts)
    layer = build("expert-choice", case, capacity_factor=factor)
    slots = slots_of(case.num_valid, factor, case.num_experts) if case.num_valid else 0
    router = layer.router.scorer.weight

    def slow(twin, x, _):
        return papers.expert_choice(x, twin(router), twin.experts, slots, case.valid_list)

    check_layer(layer, case, slow)


@pytest.mark.parametrize(("num_tokens", "factor"), [(8, 2.0), (12, 1.0), (6, 4.0)])
def test_expert_choice_every_expert_takes_exactly_its_slots(num_tokens, factor):
    layer = expert_choice(capacity_factor=factor)
    decision = layer.route(torch.randn(num_tokens, 5, dtype=torch.float64))
    taken = decision.routing.combine_matrix() > 0
    assert taken.sum(0).tolist() == [num_tokens * factor / 4] * 4
    assert int(taken.sum()) == num_tokens * factor


def test_expert_choice_of_all_tokens_is_the_dense_softmax_mixture():
    layer, x = expert_choice(capacity_factor=4.0), torch.randn(6, 5, dtype=torch.float64)
    probs = (x @ layer.router.scorer.weight.T).softmax(1)
    assert_close(layer.route(x).routing.combine_matrix(), probs)
    assert_close(layer(x), run_sparse(x, probs, Twin(layer, "swiglu").bank, "swiglu"))


def test_expert_choice_permuting_tokens_permutes_outputs():
    layer, x, order = expert_choice(), torch.randn(9, 5, dtype=torch.float64), torch.randperm(9)
    assert_close(layer(x[order]), layer(x)[order])


def test_expert_choice_with_one_expert_is_that_expert():
    layer, x = expert_choice(num_experts=1, capacity_factor=1.0), torch.randn(6, 5, dtype=torch.float64)
    assert_close(layer(x), layer.experts(x, torch.tensor([0, 6])))


@torch.no_grad()
def test_expert_choice_tokens_that_nobody_picks_get_nothing():
    layer, x = expert_choice(capacity_factor=0.5), torch.randn(32, 5, dtype=torch.float64)
    nobody = layer.route(x).routing.combine_matrix().sum(1) == 0
    assert int(nobody.sum()) >= 16
    assert float(layer(x)[nobody].abs().sum()) == 0


def test_expert_choice_ties_go_to_the_first_tokens():
    layer, x = expert_choice(capacity_factor=1.0), torch.randn(8, 5, dtype=torch.float64)
    layer.router.scorer.weight.data.zero_()
    assert layer.route(x).routing.token.tolist() == [0, 1] * 4


def test_expert_choice_padding_changes_nothing():
    layer, x, valid = expert_choice(), torch.randn(11, 5, dtype=torch.float64), torch.arange(11) % 3 > 0
    assert_close(layer(x, Context(valid=valid))[valid], layer(x[valid]))
