"""The table of slots and experts."""

import pytest

from moestro.parallel import Placement


def test_contiguous_experts_in_order() -> None:
    placement = Placement.contiguous(6, 3)
    assert placement.slots_per_rank == 2
    assert [list(placement.experts_of(rank)) for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]


def test_replicas_are_several_slots_of_one_expert() -> None:
    placement = Placement((2, 0, 1, 2), num_experts=3, ranks=2)
    assert list(placement.slots_of(2)) == [0, 3]
    assert list(placement.experts_of(1)) == [1, 2]


@pytest.mark.parametrize(
    ("slots", "experts", "ranks", "words"),
    [
        ((0, 1, 2), 3, 2, "2 or 4 slots"),
        ((0, 3), 2, 1, r"experts \[3\]"),
        ((0, 0), 2, 2, r"experts \[1\] have no slot"),
        ((), 0, 1, "needs experts"),
    ],
)
def test_impossible_tables_are_refused(slots: tuple[int, ...], experts: int, ranks: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Placement(slots, experts, ranks)


def test_experts_that_ranks_cannot_share_are_refused() -> None:
    with pytest.raises(ValueError, match="over 1, 2, 3, 6 ranks"):
        Placement.contiguous(6, 4)
