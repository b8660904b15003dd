"""Soft MoE against its equations: Puigcerver et al. 2023."""

import pytest
import torch
from oracles import papers
from oracles.experts import run_soft
from oracles.harness import Twin, build, check_layer, random_case
from torch.testing import assert_close

import moestro
from moestro.routing import Context


def soft_moe(**options):
    sizes = {"width": 5, "hidden": 4, "num_experts": 3, "slots_per_expert": 2} | options
    return moestro.build("soft-moe", **sizes).double()


@pytest.mark.parametrize("seed", range(42))
def test_soft_moe_follows_its_equations(seed):
    case = random_case(seed)
    layer = build("soft-moe", case, slots_per_expert=1 + seed % 3)
    slots, scale = layer.router.slots, layer.router.scale

    def slow(twin, x, _):
        flat = twin(slots).flatten(0, 1)  # slots of one expert are neighbours
        return papers.soft_moe(x, flat, twin(scale), twin.experts, case.valid_list, case.sequence.tolist())

    check_layer(layer, case, slow)


def test_soft_moe_is_its_two_matrices_around_the_experts():
    layer, x = soft_moe(), torch.randn(6, 5, dtype=torch.float64)
    dispatch, combine = papers.soft_moe_weights(x, layer.router.slots.flatten(0, 1), layer.router.scale)
    expected = run_soft(x, dispatch, combine, [0, 0, 1, 1, 2, 2], Twin(layer, "swiglu").bank, "swiglu")
    assert_close(layer(x), expected)


@torch.no_grad()
def test_soft_moe_weights_sum_to_one():
    layer, x = soft_moe(), torch.randn(2, 6, 5, dtype=torch.float64)
    sequence, valid = torch.arange(2).repeat_interleave(6), torch.arange(12) != 4
    routing = layer.route(x.view(12, 5), Context(sequence=sequence, valid=valid)).routing
    assert_close(routing.dispatch_weight.sum(-1), torch.ones(2, 3, 2, dtype=torch.float64))
    assert_close(routing.combine_matrix().sum(1), valid.double())
    assert float(routing.dispatch_weight[0, :, :, 4].abs().sum()) == 0  # padding is read by no slot


def test_soft_moe_with_scale_zero_gives_every_token_the_mean():
    layer, x = soft_moe(), torch.randn(6, 5, dtype=torch.float64)
    layer.router.scale.data.zero_()
    mean = x.mean(0, keepdim=True)
    outputs = layer.experts(mean.repeat(3, 1), torch.arange(4))  # one row for each expert
    assert_close(layer(x), outputs.mean(0, keepdim=True).expand(6, 5))


def test_soft_moe_permuting_tokens_permutes_outputs():
    layer, x, order = soft_moe(), torch.randn(9, 5, dtype=torch.float64), torch.randperm(9)
    assert_close(layer(x[order]), layer(x)[order])


def test_soft_moe_with_one_slot_gives_every_token_the_same():
    layer, x = soft_moe(num_experts=1, slots_per_expert=1), torch.randn(6, 5, dtype=torch.float64)
    dispatch, _ = papers.soft_moe_weights(x, layer.router.slots.flatten(0, 1), layer.router.scale)
    assert_close(layer(x), layer.experts(dispatch @ x, torch.tensor([0, 1])).expand(6, 5))


def test_soft_moe_scaling_the_input_changes_what_slots_read_but_not_the_weights():
    layer, x = soft_moe(), torch.randn(6, 5, dtype=torch.float64)
    one, ten = layer.route(x).routing, layer.route(10 * x).routing
    near = {"rtol": 0, "atol": 1e-5}  # 1e-6 inside the norm
    assert_close(one.dispatch_weight, ten.dispatch_weight, **near)
    assert_close(one.combine_weight, ten.combine_weight, **near)
    assert_close(10 * one.dispatch(x), ten.dispatch(10 * x), rtol=1e-4, atol=1e-4)


def test_soft_moe_mixes_no_sequences():
    layer, x = soft_moe(), torch.randn(3, 4, 5, dtype=torch.float64)
    assert_close(layer(x), torch.stack([layer(one) for one in x]))
