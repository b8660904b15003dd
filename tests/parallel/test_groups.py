"""Which ranks form a group: the numbering of Megatron-Core, and meshes that do not fit."""

import pytest

from moestro.parallel import Mesh, MeshShape, rank_groups


def test_the_published_numbering() -> None:
    sizes = {"tp": 2, "dp": 2, "pp": 4}
    assert rank_groups(sizes, ["tp"])[:2] == [[0, 1], [2, 3]]
    assert rank_groups(sizes, ["dp"])[:4] == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert rank_groups(sizes, ["pp"])[:2] == [[0, 4, 8, 12], [1, 5, 9, 13]]
    assert rank_groups({"a": 2, "b": 3, "c": 4}, ["b"])[-1] == [19, 21, 23]
    assert rank_groups({"a": 2, "b": 3, "c": 4}, ["b"])[0] == [0, 2, 4]


@pytest.mark.parametrize("axes", [["a"], ["b"], ["c"], ["a", "b"], ["a", "c"], ["b", "c"], ["a", "b", "c"], []])
def test_groups_share_out_the_world(axes: list[str]) -> None:
    groups = rank_groups({"a": 2, "b": 3, "c": 4}, axes)
    assert sorted(rank for group in groups for rank in group) == list(range(24))


def test_unknown_axes_are_refused() -> None:
    with pytest.raises(ValueError, match="need sizes"):
        rank_groups({"a": 2}, ["b"])


def test_data_parallelism_takes_the_rest() -> None:
    assert MeshShape.fitting(8, expert=2, tensor=2) == MeshShape(data=2, expert=2, tensor=2)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MeshShape.fitting(3, expert=2), "start 2, 4, 6, 8, ... processes"),
        (lambda: MeshShape(data=0), "at least 1"),
        (lambda: MeshShape(data=3, copies=2), "copies=2 does not divide the 3 ranks"),
        (lambda: Mesh(MeshShape()), "init_process_group first"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(make: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()  # type: ignore[operator]
