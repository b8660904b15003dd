"""Every bank computes its formula, expert by expert, with every gradient."""

import pytest
import torch
from oracles.experts import feed_forward, split_bank
from torch import nn
from torch.testing import assert_close

from moestro.experts import (
    ACTIVATIONS,
    ConcatExperts,
    ConstantExperts,
    CopyExperts,
    FeedForward,
    GatedFeedForward,
    ModuleExperts,
    ZeroExperts,
    all_kernels,
    make_experts,
)
from moestro.experts.base import Experts
from moestro.routing import MergeRouting, SparseRouting

OFFSETS = torch.tensor([0, 2, 2, 5])


def lively(experts: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(0, 0.5)
    return experts.double()


@pytest.mark.parametrize("kernel", all_kernels("cpu"))
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_stacked_bank_is_its_experts(activation: str, bias: bool, kernel: str) -> None:
    experts = lively(make_experts(3, 4, 5, activation, bias, kernel))
    rows = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    bank = split_bank(dict(experts.named_parameters()))
    owner = [0, 0, 2, 2, 2]
    expected = torch.stack([feed_forward(row, bank[e], activation) for row, e in zip(rows, owner, strict=True)])
    assert_close(experts(rows, OFFSETS), expected, rtol=1e-12, atol=1e-12)
    inputs = [rows, *experts.parameters()]
    got = torch.autograd.grad(experts(rows, OFFSETS).square().sum(), inputs)
    want = torch.autograd.grad(expected.square().sum(), inputs)
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation: str) -> None:
    experts = lively(make_experts(2, 2, 3, activation, bias=True))
    rows = torch.randn(3, 2, dtype=torch.float64, requires_grad=True) + 0.3
    offsets = torch.tensor([0, 1, 3])
    assert torch.autograd.gradcheck(lambda r: experts(r, offsets), (rows.detach().requires_grad_(),))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_dense_network_is_a_bank_of_one(activation: str) -> None:
    experts = lively(make_experts(1, 4, 6, activation, bias=True))
    dense = experts.dense(1).double()
    assert isinstance(dense, FeedForward)
    dense.load_state_dict({name: value[0] for name, value in experts.state_dict().items()})
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    assert_close(dense(x).flatten(0, 1), experts(x.flatten(0, 1), torch.tensor([0, 6])))
    assert experts.dense(3).hidden == 18


def test_a_gated_shared_expert_starts_at_one_half() -> None:
    inner = FeedForward(4, 6)
    x = torch.randn(5, 4)
    assert_close(GatedFeedForward(inner)(x), 0.5 * inner(x))


def test_any_modules_can_be_experts() -> None:
    linear = nn.Linear(4, 4)
    experts = ModuleExperts([linear, nn.Identity(), nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 4))], 4)
    rows = torch.randn(5, 4)
    y = experts(rows, OFFSETS)
    assert_close(y[:2], linear(rows[:2]))
    assert_close(y[2:], experts.experts[2](rows[2:]))
    with pytest.raises(ValueError, match="at least one module"):
        ModuleExperts([], 4)


def test_modules_of_one_shape_merge_like_stacked_weights() -> None:
    experts = ModuleExperts([nn.Linear(4, 4) for _ in range(3)], 4).double()
    mixture = torch.tensor([[0.2, 0.3, 0.5], [0.0, 1.0, 0.0]], dtype=torch.float64)
    rows = torch.randn(4, 4, dtype=torch.float64)
    y = experts.merged(mixture, rows, torch.tensor([0, 3, 4]))
    weight = sum(m * e.weight for m, e in zip(mixture[0], experts.experts, strict=True))
    bias = sum(m * e.bias for m, e in zip(mixture[0], experts.experts, strict=True))
    assert_close(y[:3], rows[:3] @ weight.t() + bias)
    assert_close(y[3:], experts.experts[1](rows[3:]))
    with pytest.raises(ValueError, match="cannot be merged"):
        ModuleExperts([nn.Linear(4, 4), nn.Identity()], 4).merged(mixture[:, :2], rows, torch.tensor([0, 3, 4]))


def test_one_hot_merging_is_the_expert_itself() -> None:
    experts = lively(make_experts(3, 4, 5, bias=True))
    rows = SparseRouting.from_choice(torch.tensor([[1], [0], [1]]), torch.ones(3, 1, dtype=torch.float64), 2)
    routing = MergeRouting(torch.eye(3, dtype=torch.float64)[[2, 0]], rows)
    x = torch.randn(3, 4, dtype=torch.float64)
    direct = SparseRouting.from_choice(torch.tensor([[0], [2], [0]]), torch.ones(3, 1, dtype=torch.float64), 3)
    assert_close(experts.run(x, routing), experts.run(x, direct))


def test_trivial_experts() -> None:
    rows = torch.randn(5, 4)
    assert not ZeroExperts(3, 4)(rows, OFFSETS).any()
    assert torch.equal(CopyExperts(3, 4)(rows, OFFSETS), rows)
    constant = ConstantExperts(3, 4)
    assert_close(constant(rows, OFFSETS), rows / 2)  # equal shares of the row and of a zero vector
    with torch.no_grad():
        constant.weight[2, :, 1], constant.vector[2] = 1.0, torch.arange(4.0)
    share = torch.stack([torch.zeros(3), rows[2:].sum(1)], 1).softmax(1)
    expected = share[:, :1] * rows[2:] + share[:, 1:] * torch.arange(4.0)
    assert_close(constant(rows, OFFSETS)[2:], expected)


def test_banks_side_by_side() -> None:
    glu = make_experts(2, 4, 3)
    experts = ConcatExperts([glu, ZeroExperts(1, 4), CopyExperts(1, 4)])
    rows = torch.randn(7, 4)
    y = experts(rows, torch.tensor([0, 1, 3, 5, 7]))
    assert experts.num_experts == 4
    assert_close(y[:3], glu(rows[:3], torch.tensor([0, 1, 3])))
    assert not y[3:5].any()
    assert torch.equal(y[5:], rows[5:])
    with pytest.raises(ValueError, match="share one width"):
        ConcatExperts([ZeroExperts(1, 4), ZeroExperts(1, 5)])
    with pytest.raises(ValueError, match="cannot be merged"):
        experts.merged(torch.eye(4), rows, torch.tensor([0, 1, 3, 5, 7]))


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="hidden must be at least 1, got 0"):
        make_experts(2, 4, 0)
    with pytest.raises(ValueError, match="unknown activation 'swish'; choose one of"):
        make_experts(2, 4, 4, "swish")
    with pytest.raises(ValueError, match="unknown kernel 'fast'"):
        make_experts(2, 4, 4, kernel="fast")
    with pytest.raises(ValueError, match="no dense twin"):
        ZeroExperts(2, 4).dense()


class Doubling(Experts):
    """A bank of the user's own: one method is enough."""

    num_experts, width = 2, 4

    def forward(self, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return rows * 2


def test_a_bank_needs_only_forward() -> None:
    index = torch.tensor([[0, 1], [1, 0]])
    routing = SparseRouting.from_choice(index, torch.tensor([[0.5, 0.25], [1.0, 0.0]]), 2)
    x = torch.randn(2, 4)
    assert_close(Doubling().run(x, routing), x * torch.tensor([[1.5], [2.0]]))
