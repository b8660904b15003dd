"""MPipeMoE's choices (`mpipemoe`): the number of parts by intervals, and the strategy by what it costs and keeps.

That outputs and all gradients are those of one process is tested in `test_exactness.py`.
"""

import math
import random
from itertools import pairwise

import pytest
from oracles.ranks import run_ranks

from moestro.parallel.intervals import Interval, Intervals
from moestro.parallel.strategy_costs import Rates, cheapest, units_of
from moestro.parallel.transports import Granular

PARTS = (1, 2, 4, 8)
PAPER = {  # Zhang et al. 2023, the loads of the three streams forward and backward
    "none": ((2, 2, 0), (4, 2, 0)),
    "S1": ((2, 2, 5), (4, 2, 5)),
    "S2": ((2, 2, 4), (4, 3, 4)),
    "S3": ((2, 2, 1), (5, 2, 1)),
    "S4": ((2, 2, 0), (5, 3, 0)),
}


def disjoint_and_rising(table: Intervals) -> bool:
    return all(a.last < b.first and a.parts < b.parts for a, b in pairwise(table.found))


@pytest.mark.parametrize("seed", range(20))
def test_intervals_say_what_measuring_everything_would_and_measure_less(seed: int) -> None:
    chance, asked = random.Random(seed), list[int]()
    bounds = sorted(chance.sample(range(1, 400), 3))  # more rows, more parts

    def best(rows: int) -> int:
        return PARTS[sum(rows >= bound for bound in bounds)]

    table = Intervals()
    for _ in range(300):
        rows = chance.randrange(400)

        def seconds(parts: int, rows: int = rows) -> float:
            asked.append(parts)
            return abs(math.log2(parts / best(rows)))

        assert table.parts_for(rows, PARTS, seconds) == best(rows)
        assert disjoint_and_rising(table)
    before = len(asked)
    assert before < 300 * len(PARTS) / 10
    for each in table.found:
        assert table.parts_for((each.first + each.last) // 2, PARTS, lambda _: 1 / 0) == each.parts
    assert Intervals(table.found).found == table.found


@pytest.mark.parametrize("seed", range(5))
def test_whatever_is_measured_more_rows_never_have_fewer_parts(seed: int) -> None:
    chance, table, answers = random.Random(seed), Intervals(), dict[int, int]()
    for _ in range(200):
        rows = chance.randrange(1000)
        parts = table.parts_for(rows, PARTS, lambda _: chance.random())
        assert answers.setdefault(rows, parts) == parts
        assert disjoint_and_rising(table)
    rising = [answers[rows] for rows in sorted(answers)]
    assert rising == sorted(rising)


def test_neighbours_of_one_kind_become_one_interval() -> None:
    table = Intervals([Interval(10, 20, 2), Interval(40, 50, 4)])
    assert table.parts_for(30, PARTS, {2: 1.0, 4: 2.0}.__getitem__) == 2
    assert table.found == [Interval(10, 30, 2), Interval(40, 50, 4)]
    assert table.parts_for(35, PARTS, {2: 2.0, 4: 1.0}.__getitem__) == 4
    assert table.found == [Interval(10, 30, 2), Interval(35, 50, 4)]
    same = Intervals([Interval(10, 20, 2), Interval(40, 50, 2)])
    assert same.parts_for(30, PARTS, lambda _: 1 / 0) == 2
    assert same.found == [Interval(10, 50, 2)]


@pytest.mark.parametrize("name", PAPER)
def test_loads_of_the_streams_are_those_of_the_paper(name: str) -> None:
    assert units_of(name, middle=4, again=1) == PAPER[name]
    forward, backward = units_of(name, middle=4)
    assert (forward, backward[1:]) == (PAPER[name][0], PAPER[name][1][1:])
    assert backward[0] == PAPER[name][1][0] + (name in ("S3", "S4"))  # here experts run whole


def test_the_cheapest_strategy_that_fits_is_chosen() -> None:
    def chosen(product: float, wire: float, copy: float, memory: int | None, *speeds: float) -> str:
        return cheapest(Rates(product, wire, copy, 8, 32), 10, PAPER, memory, *speeds)

    assert chosen(1, 1, 1, None) == "none"
    assert chosen(1, 1, 1, 400) == "none"  # 10 rows of 8 bytes and 32
    assert chosen(1, 1, 0.01, 399) == "S1"  # copies cost nothing: no more products, no more journeys
    assert chosen(0.01, 1, 1.5, 399) == "S3"  # products cost nothing, one copy less than a journey
    assert chosen(0.01, 1, 9, 399) == "S4"  # copies are dear: rows travel again
    assert chosen(0.01, 1, 9, 79) == "S3"  # which keeps the sender's rows
    assert chosen(0.01, 1, 1.5, 399, 1.0, 0.1) == "S4"  # copies that the others slow down
    with pytest.raises(ValueError, match="memory=79 bytes: 10 rows keep 80 with S4"):
        cheapest(Rates(1, 1, math.inf, 8, 32), 10, ["none", "S4"], 79)
    with pytest.raises(ValueError, match="unknown strategy 'S5'; there are none, S1"):
        units_of("S5")
    # two of three streams wait for the slowest: by hand, forward max(2, 4, 5 * 3), backward max(4, 3 * 2, 4 * 3)
    assert Rates(1, 2, 3, 8, 32).seconds("S2") == max(2, 4, 12) + max(4, 6, 12)


def test_layers_take_the_parts_of_their_rows_and_the_strategy_of_their_memory() -> None:
    for answer in run_ranks("oracles.tried:granular", 2, None, seconds=100):
        assert answer["parts"] == [[16, 1], [64, 4], [32, 2], [48, 2], [64, 4], [500, 8]]
        assert answer["asked"] == [4, 4, 3, 2, 0, 2]  # rows between two sizes leave less to ask
        assert answer["apart"] < 1e-12
        assert (answer["restored"], answer["tried again"]) == (True, 0)
        limits = answer["limits"]
        assert (limits["none"], limits["sends"]) == ("none", "S4")
        assert limits["files"] in ("S1", "S2", "S3", "S4")  # as fast as this machine says
        row, middle = 6 * 8, 8 * 8  # relu keeps its results
        assert answer["rates"]["row_bytes"] == row
        assert answer["rates"]["middle_bytes"] == middle
        assert min(answer["rates"][name] for name in ("product", "wire")) > 0
        assert "allow more, or pass a store" in answer["too little"]


@pytest.mark.parametrize("wrong", [{"parts": ()}, {"parts": (0, 1)}, {"repeats": 0}, {"slower_wire": 0.0}])
def test_what_cannot_be_chosen_from_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"at least 1|must be shares"):
        Granular(**wrong)  # type: ignore[arg-type]
