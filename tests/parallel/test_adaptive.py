"""Tutel's adaptive degree (`tutel-adaptive`): every layout sends what it says, and gives the same.

That outputs and all gradients are those of one process, for every degree, is tested in `test_exactness.py`.
"""

from typing import Any

import pytest
from oracles.degrees import TOKENS, TOP_K, WIDTH
from oracles.ranks import run_ranks

from moestro.parallel.transports.adaptive import bytes_of_degree

ROWS, ROW = TOKENS * TOP_K, WIDTH * 4
CASES = [
    {"expert": expert, "tensor": 4 // expert, "hidden": 8, "degree": degree}
    for expert, degrees in ((2, (0, 1, 2)), (1, (0, 1, 2, 4)), (4, (0, 1)))
    for degree in degrees
]
CHOSEN = [{**CASES[0], "hidden": hidden, "degree": None} for hidden in (4, 12, 40)]


def share(case: dict[str, Any]) -> int:
    """Bytes of a rank's slices: two matrices of each of its experts."""
    return 4 // case["expert"] * 2 * WIDTH * case["hidden"] // case["tensor"] * 4


def expected(case: dict[str, Any]) -> dict[str, int]:
    """Written out for each layout: what goes to other ranks, forward; an even load."""
    ranks, slices, degree, weights = case["expert"], case["tensor"], case["degree"], share(case)
    if degree == 0:  # slices to the ranks of `tensor`, then whole experts to those of `expert`
        return {"experts": weights * (slices - 1) + weights * slices * (ranks - 1)}
    away = ROWS * ROW * (ranks - 1) // ranks
    visits = ROWS * ROW * (degree - 1)
    each = {"dispatch": away, "combine": away, "slices in": visits, "slices out": visits}
    return each | {"experts": weights * (slices // degree - 1)}


def test_every_degree_sends_what_its_closed_form_says() -> None:
    for rank, answer in enumerate(run_ranks("oracles.degrees:sent", 4, [*CASES, *CHOSEN], seconds=60)):
        for case, got in zip(CASES, answer, strict=False):
            for phase in ("forward", "backward"):
                names = {n: b for n, b in expected(case).items() if b}
                found = {n.rpartition(" ")[0]: b for n, b in got["bytes"].items() if n.endswith(phase)}
                found.pop("counts", None)
                assert found == names, f"rank {rank}, {case}, {phase}"
            total = bytes_of_degree(case["degree"], ROWS, ROW, share(case), case["expert"], case["tensor"])
            assert total == sum(expected(case).values())
        chosen = [got["taken"] for got in answer[len(CASES) :]]
        fewest = [min((0, 1, 2), key=lambda d, c=c: sum(expected({**c, "degree": d}).values())) for c in CHOSEN]
        assert chosen == [[degree] for degree in fewest]
        assert fewest == [0, 1, 2]  # small experts travel to the rows, large ones are visited


def test_a_change_of_degree_moves_no_weight_and_gives_the_same() -> None:
    degrees = [4, 2, 1, 0, 4]
    for answer in run_ranks("oracles.degrees:switched", 4, degrees, seconds=60):
        assert answer["apart"] < 1e-12 * answer["size"]
        assert answer["same"]
        assert answer["taken"] == {"4": 2, "2": 1, "1": 1, "0": 1}


@pytest.mark.parametrize("rows", [1, 100, 10_000])
def test_one_slice_and_one_rank_need_no_bytes(rows: int) -> None:
    assert bytes_of_degree(1, rows, ROW, 1000, ranks=1, slices=1) == 0
    assert bytes_of_degree(0, rows, ROW, 1000, ranks=1, slices=1) == 0
