"""Few tokens take a way of their own, which computes the same."""

import pytest
import torch
from torch.testing import assert_close

from moestro.experts import make_experts
from moestro.experts.few import run_few
from moestro.kernels.gathered import FEW_PAIRS, gathered_product, gathered_rows
from moestro.routing import SparseRouting


def routing_of(tokens: int, num_experts: int, k: int, **options) -> SparseRouting:
    index, weight = torch.rand(tokens, num_experts).topk(k).indices, torch.rand(tokens, k)
    return SparseRouting.from_choice(index, weight, num_experts, **options)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("pairs", "width", "out"), [(1, 1, 1), (5, 7, 3), (8, 33, 50), (32, 64, 16)])
def test_gathered_product_equals_one_row_at_a_time(dtype, tolerance, pairs, width, out):
    weight, rows = torch.randn(6, width, out).to(dtype), torch.randn(pairs, width).to(dtype)
    expert = torch.randint(0, 6, (pairs,))
    y = gathered_product(rows, gathered_rows(expert, width), weight)
    expected = torch.stack(
        [row.double() @ weight[e].double() for row, e in zip(rows, expert.tolist(), strict=True)]
    )
    assert y.dtype == dtype
    assert_close(y.double(), expected, rtol=tolerance, atol=tolerance * width**0.5)


@pytest.mark.parametrize("scale", ["output", "input"])
@pytest.mark.parametrize(("activation", "bias"), [("swiglu", False), ("geglu", True), ("relu", True)])
@pytest.mark.parametrize(("tokens", "k"), [(1, 1), (1, 4), (3, 2), (16, 2)])
def test_equals_the_ordinary_way(tokens, k, activation, bias, scale):
    bank = make_experts(6, 24, 20, activation, bias)
    for parameter in bank.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    routing, x = routing_of(tokens, 6, k, scale=scale), torch.randn(tokens, 24)
    expected = bank.run(x, routing).detach()  # gradients are asked for: the ordinary way
    with torch.inference_mode():
        assert run_few(bank, x, routing) is not None
        assert_close(bank.run(x, routing), expected, rtol=1e-4, atol=1e-5)


def test_dropped_choices_contribute_nothing():
    bank, x = make_experts(4, 8, 8), torch.randn(1, 8)
    index, weight = torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]])
    routing = SparseRouting.from_choice(index, weight, 4, torch.tensor([[True, False]]))
    only = SparseRouting.from_choice(index[:, :1], weight[:, :1], 4)
    nobody = SparseRouting.from_choice(index, weight, 4, torch.tensor([[False, False]]))
    with torch.inference_mode():
        assert_close(bank.run(x, routing), bank.run(x, only))
        assert not bank.run(x, nobody).any()


def test_the_ordinary_way_is_kept_where_it_must_be():
    bank, x = make_experts(4, 8, 8), torch.randn(2, 8)
    routing = routing_of(2, 4, 2)
    assert run_few(bank, x, routing) is None  # gradients
    with torch.no_grad():
        assert run_few(bank, x, routing) is not None
        assert run_few(bank.bfloat16(), x, routing) is None  # dtypes that differ
        assert run_few(make_experts(4, 8, 8, kernel="loop"), x, routing) is None
        assert run_few(make_experts(4, 8, 8).double(), x.double(), routing) is None
        many = FEW_PAIRS // 2 + 1
        assert run_few(make_experts(4, 8, 8), torch.randn(many, 8), routing_of(many, 4, 2)) is None
        assert run_few(make_experts(4, 8, 8), x[:0], routing_of(0, 4, 2)) is None
