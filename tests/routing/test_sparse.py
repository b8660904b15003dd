"""The algebra of pairs sorted by expert, checked against dense matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from moestro.routing import Selection, SparseRouting, top_k


def test_the_worked_example() -> None:
    index = torch.tensor([[2, 0], [0, 1], [2, 1], [2, 0]])
    weight = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.9, 0.1], [0.5, 0.5]])
    routing = SparseRouting.from_choice(index, weight, num_experts=3)
    assert routing.token.tolist() == [0, 1, 3, 1, 2, 0, 2, 3]
    assert routing.offsets.tolist() == [0, 3, 5, 8]
    assert routing.load().tolist() == [3, 2, 3]
    assert_close(routing.weight, torch.tensor([0.3, 0.6, 0.5, 0.4, 0.1, 0.7, 0.9, 0.5]))
    expected = torch.tensor([[0.3, 0, 0.7], [0.6, 0.4, 0], [0, 0.1, 0.9], [0.5, 0, 0.5]])
    assert_close(routing.combine_matrix(), expected)
    routing.check()


@st.composite
def choices(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, int]:
    tokens, experts = draw(st.integers(0, 12)), draw(st.integers(1, 9))
    k = draw(st.integers(1, experts))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    index = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :k]
    weight = torch.rand(tokens, k, generator=generator, dtype=torch.float64)
    keep = torch.rand(tokens, k, generator=generator) < 0.6 if draw(st.booleans()) else None
    return index, weight, keep, experts


@settings(max_examples=80, deadline=None)
@given(choices(), st.sampled_from(["output", "input"]))
def test_dispatch_and_combine_are_the_dense_matrices(case: tuple, scale: str) -> None:
    index, weight, keep, num_experts = case
    tokens, k = index.shape
    weight.requires_grad_()
    routing = SparseRouting.from_choice(index, weight, num_experts, keep, scale)
    routing.check()
    kept = torch.ones_like(index, dtype=torch.bool) if keep is None else keep
    dense = torch.zeros(tokens, num_experts, dtype=torch.float64)
    for t in range(tokens):
        for j in range(k):
            dense[t, index[t, j]] += weight[t, j] * kept[t, j]
    assert_close(routing.combine_matrix(), dense)
    x = torch.randn(tokens, 3, dtype=torch.float64, requires_grad=True)
    factor = torch.arange(1.0, num_experts + 1, dtype=torch.float64)  # expert e multiplies by e + 1
    y = routing.combine(routing.dispatch(x) * factor[routing.expert].unsqueeze(1))
    expected = (dense * factor).sum(1, keepdim=True) * x + 0 * weight.sum()
    assert_close(y, expected)
    target = torch.randn_like(expected)
    got = torch.autograd.grad((y * target).sum(), (x, weight))
    want = torch.autograd.grad((expected * target).sum(), (x, weight))
    for g, w in zip(got, want, strict=True):
        assert_close(g, w)


@pytest.mark.parametrize("keep", [None, torch.tensor([[True, False], [True, True], [False, False]])])
def test_gradcheck_and_gradgradcheck(keep: torch.Tensor | None) -> None:
    index = torch.tensor([[1, 0], [0, 2], [2, 1]])
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)

    def layer(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        routing = SparseRouting.from_choice(index, weight, 3, keep)
        return routing.combine(routing.dispatch(x) ** 2)

    assert torch.autograd.gradcheck(layer, (x, weight))
    assert torch.autograd.gradgradcheck(layer, (x, weight))


def test_experts_that_choose_are_put_in_token_order() -> None:
    token, weight = torch.tensor([[3, 0], [2, 3]]), torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    routing = SparseRouting.from_experts(token, weight, num_tokens=4)
    routing.check()
    assert routing.token.tolist() == [0, 3, 2, 3]
    assert_close(routing.combine_matrix(), torch.tensor([[0.2, 0], [0, 0], [0, 0.3], [0.1, 0.4]]))
    rows = torch.ones(4, 1)
    assert_close(routing.combine(rows), torch.tensor([[0.2], [0.0], [0.3], [0.5]]))


def test_ties_go_to_the_lowest_expert() -> None:
    assert top_k(torch.ones(2, 5), 3).tolist() == [[0, 1, 2], [0, 1, 2]]
    assert top_k(torch.tensor([1.0, 3.0, 3.0, 2.0]), 3).tolist() == [1, 2, 3]


def test_restricting_twice_keeps_what_both_keep() -> None:
    chosen = Selection(torch.tensor([[0, 1], [1, 0]]))
    assert chosen.restricted(None).keep is None
    once = chosen.restricted(torch.tensor([[True], [False]]))
    twice = once.restricted(torch.tensor([[False, True], [True, True]]))
    assert twice.keep.tolist() == [[False, True], [False, False]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": torch.tensor([0, 3, 2, 4])}, "offsets must rise"),
        ({"offsets": torch.tensor([0, 1, 2, 3])}, "offsets must rise from 0 to 4"),
        ({"token": torch.tensor([0, 1, 0, 7])}, "tokens 0 to 1"),
        ({"token": torch.tensor([1, 0, 0, 1])}, "token order"),
        ({"weight": torch.ones(3)}, "as many weights"),
    ],
)
def test_check_names_the_broken_invariant(change: dict, message: str) -> None:
    good = {"token": torch.tensor([0, 1, 0, 1]), "weight": torch.ones(4), "offsets": torch.tensor([0, 2, 4, 4])}
    SparseRouting(**good, num_tokens=2).check()
    with pytest.raises(ValueError, match=message):
        SparseRouting(**{**good, **change}, num_tokens=2).check()
