"""Routings written down as whole matrices, and positions read off a batch."""

import torch
from torch.testing import assert_close

from moestro.routing import Context, SparseRouting


def test_from_matrix_keeps_what_it_is_told() -> None:
    weight = torch.rand(5, 3, dtype=torch.float64, requires_grad=True)
    keep = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 0]]).bool()
    routing = SparseRouting.from_matrix(weight, keep)
    routing.check()
    assert_close(routing.combine_matrix(), weight * keep)
    assert routing.load().tolist() == [3, 2, 2]
    x = torch.randn(5, 4, dtype=torch.float64)
    y = routing.combine(routing.dispatch(x))
    assert_close(y, (weight * keep).sum(1, keepdim=True) * x)
    y.sum().backward()
    assert_close(weight.grad, keep * x.sum(1, keepdim=True))
    SparseRouting.from_matrix(weight[:0], keep[:0]).check()


def test_a_batch_of_sequences_has_positions() -> None:
    context = Context().with_sequences_of(torch.zeros(2, 3, 4))
    assert context.sequence is not None
    assert context.position is not None
    assert context.sequence.tolist() == [0, 0, 0, 1, 1, 1]
    assert context.position.tolist() == [0, 1, 2, 0, 1, 2]
    given = Context(position=torch.arange(6)).with_sequences_of(torch.zeros(2, 3, 4))
    assert given.position is not None
    assert given.position.tolist() == list(range(6))
