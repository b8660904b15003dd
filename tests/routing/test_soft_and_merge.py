"""Dense and merging routings agree with whole matrices written out."""

import pytest
import torch
from torch.testing import assert_close

from moestro.routing import Context, MergeRouting, SoftRouting, SparseRouting
from moestro.routing.context import group_by_sequence


def soft_example() -> SoftRouting:
    token, present, _ = group_by_sequence(torch.tensor([5, 5, 9, 5, 9]), None, 5, torch.device("cpu"))
    assert token.tolist() == [[0, 1, 3], [2, 4, 0]]
    assert present.tolist() == [[True, True, True], [True, True, False]]
    absent = ~present[:, :, None, None]
    logits = torch.randn(2, 3, 2, 2, dtype=torch.float64)  # groups, length, experts, slots
    dispatch = logits.masked_fill(absent, -torch.inf).softmax(1)
    combine = logits.flatten(2).softmax(-1).view_as(logits).masked_fill(absent, 0)
    return SoftRouting(token, dispatch.permute(0, 2, 3, 1), combine, 5)


def test_soft_routing_is_two_block_diagonal_matrices() -> None:
    routing = soft_example()
    routing.check()
    x = torch.randn(5, 3, dtype=torch.float64)
    dispatch, combine = torch.zeros(8, 5, dtype=torch.float64), torch.zeros(5, 8, dtype=torch.float64)
    members = [[0, 1, 3], [2, 4]]
    for e in range(2):
        for g in range(2):
            for s in range(2):
                row = e * 4 + g * 2 + s
                for place, t in enumerate(members[g]):
                    dispatch[row, t] = routing.dispatch_weight[g, e, s, place]
                    combine[t, row] = routing.combine_weight[g, place, e, s]
    rows = routing.dispatch(x)
    assert_close(rows, dispatch @ x)
    assert_close(routing.combine(rows), combine @ rows)
    assert routing.offsets.tolist() == [0, 4, 8]
    assert_close(routing.combine_matrix(), torch.stack([combine[:, :4].sum(1), combine[:, 4:].sum(1)], 1))
    assert_close(routing.load(), routing.combine_matrix().sum(0))


def test_soft_check_refuses_weights_that_do_not_fit() -> None:
    routing = soft_example()
    with pytest.raises(ValueError, match="combine_weight must be"):
        SoftRouting(routing.token, routing.dispatch_weight, routing.combine_weight[:1], 5).check()
    with pytest.raises(ValueError, match="at most 1"):
        SoftRouting(routing.token, routing.dispatch_weight * 3, routing.combine_weight, 5).check()


def test_merge_routing_shares_out_loads() -> None:
    rows = SparseRouting.from_choice(torch.tensor([[1], [0], [1]]), torch.ones(3, 1), num_experts=2)
    routing = MergeRouting(torch.tensor([[1.0, 0, 0], [0, 0.25, 0.75]]), rows)
    routing.check()
    assert_close(routing.load(), torch.tensor([1.0, 0.5, 1.5]))
    assert_close(routing.combine_matrix(), torch.tensor([[0, 0.25, 0.75], [1, 0, 0], [0, 0.25, 0.75]]))
    with pytest.raises(ValueError, match="2 virtual experts but mixture describes 1"):
        MergeRouting(routing.mixture[:1], rows).check()


def test_context_wants_one_entry_per_token_and_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r"Context.valid has shape \[3\] but there are 4 tokens"):
        Context(valid=torch.ones(3, dtype=torch.bool)).check(4)
    with pytest.raises(ValueError, match=r"hash routing needs Context.token_ids; call the layer with"):
        Context().need("token_ids", "hash routing")


def test_sequences_come_from_the_shape() -> None:
    assert Context().with_sequences_of(torch.zeros(2, 3, 1)).sequence.tolist() == [0, 0, 0, 1, 1, 1]
    assert Context().with_sequences_of(torch.zeros(6, 1)).sequence is None
    given = Context(sequence=torch.zeros(6, dtype=torch.long))
    assert given.with_sequences_of(torch.zeros(2, 3, 1)) is given
