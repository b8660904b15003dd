"""Affine experts compute their formula and may change the width."""

import pytest
import torch
from torch.testing import assert_close

from moestro.experts import AffineExperts
from moestro.kernels import all_backends
from moestro.layers import MoE
from moestro.routers import TokenChoice, as_is, softmax
from moestro.routers.dense import EveryExpert
from moestro.routers.gate_networks import Affine
from moestro.routing import MergeRouting, SparseRouting

LINKS = {
    "identity": lambda row: row,
    "relu": lambda row: row.clamp(min=0),
    "tanh": lambda row: row.tanh(),
    "exp": lambda row: row.exp(),
    "softmax": lambda row: row.exp() / row.exp().sum(),
}


def bank(link, kernel="auto"):
    experts = AffineExperts(3, 4, 2, link, kernel).double()
    torch.nn.init.normal_(experts.bias)
    return experts


@pytest.mark.parametrize("kernel", all_backends("cpu"))
@pytest.mark.parametrize("link", LINKS)
def test_every_row_meets_its_own_expert_with_every_gradient(link, kernel):
    experts, rows = bank(link, kernel), torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    owner = [0, 0, 2, 2, 2]
    expected = torch.stack(
        [LINKS[link](row @ experts.weight[e] + experts.bias[e]) for row, e in zip(rows, owner, strict=True)]
    )
    got = experts(rows, torch.tensor([0, 2, 2, 5]))
    assert_close(got, expected)
    inputs, probe = [rows, *experts.parameters()], torch.randn(5, 2, dtype=torch.float64)
    for g, w in zip(
        torch.autograd.grad(got, inputs, probe), torch.autograd.grad(expected, inputs, probe), strict=True
    ):
        assert_close(g, w)


@pytest.mark.parametrize("link", LINKS)
def test_a_dense_layer_of_them_is_a_mixture_of_experts(link):
    experts, x = bank(link), torch.randn(2, 3, 4, dtype=torch.float64)
    router = TokenChoice(Affine(4, 3, std=1.0).double(), EveryExpert(3), softmax, as_is)
    layer = MoE(router, experts)
    share = (x @ router.scorer.weight.T + router.scorer.bias).softmax(-1)
    linear = torch.einsum("blw,ewo->bleo", x, experts.weight) + experts.bias
    each = linear.softmax(-1) if link == "softmax" else LINKS[link](linear)
    assert_close(layer(x), (share.unsqueeze(-1) * each).sum(2))
    assert layer(x[:, :0]).shape == (2, 0, 2)


def test_merged_experts_have_the_bank_s_width():
    experts, x = bank("identity"), torch.randn(2, 4, dtype=torch.float64)
    mixture = torch.tensor([[0.2, 0.3, 0.5], [0.0, 1.0, 0.0]], dtype=torch.float64)
    rows = SparseRouting.from_choice(torch.tensor([[0], [1]]), torch.ones(2, 1, dtype=torch.float64), 2)
    weight = torch.einsum("ve,ewo->vwo", mixture, experts.weight)
    expected = torch.einsum("tw,two->to", x, weight) + mixture @ experts.bias
    assert_close(experts.run(x, MergeRouting(mixture, rows)), expected)
    nobody = SparseRouting.from_choice(torch.zeros(0, 1, dtype=torch.long), torch.ones(0, 1), 0)
    assert experts.run(x[:0], MergeRouting(mixture[:0], nobody)).shape == (0, 2)


def test_an_unknown_link_is_refused():
    with pytest.raises(ValueError, match="unknown link 'probit'; choose one of identity, relu, tanh, exp, softmax"):
        AffineExperts(2, 3, 1, "probit")
