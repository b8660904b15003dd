"""Tutel's measured dictionary (`tutel-adaptive`): what is tried, chosen, kept and left as it was.

That outputs and all gradients are those of one process is tested in `test_exactness.py`.
"""

from math import ceil, log

import pytest
import torch
from oracles.ranks import run_ranks
from oracles.tried import resumed_runs
from safetensors.torch import load_file

from moestro.parallel.search import lowest
from moestro.parallel.transports import Measured
from moestro.train.files import read_lines

SECONDS = 0.03  # of a sleep, far above what the exchange takes
ROW = 6 * 4


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 8, 13, 40])
def test_ternary_search_finds_the_lowest_of_what_falls_and_rises(number: int) -> None:
    for best in range(number):
        asked: list[int] = []

        def cost(value: int, best: int = best, asked: list[int] = asked) -> float:
            asked.append(value)
            return 3.0 * (best - value) if value < best else float(value - best) ** 2

        assert lowest(list(range(number)), cost) == best
        assert len(asked) == len(set(asked)) <= 2 * ceil(log(number, 1.5)) + 3
    assert lowest([7, 8, 9], lambda value: 0.0) == 7


def test_the_fastest_is_measured_once_for_a_size_and_is_the_same_on_all_ranks() -> None:
    first, second = run_ranks("oracles.tried:choices", 2, SECONDS, seconds=60)
    for answer in (first, second):
        # with gradients the way that sleeps longest in all, on whichever rank, is left out; without, no way back
        assert answer["chosen"] == {"1 0": [1, "slow there"], "0 0": [1, "slow back"], "1 1": [1, "slow there"]}
        assert [call["tried"] for call in answer["calls"]] == [True, False, True, True, False, False]
        assert [call["sent"] for call in answer["calls"]] == [n * ROW // 2 for n in (8, 8, 8, 40, 8, 8)]
        assert all(call["grads"] for call in answer["calls"])
        assert answer["taken"] == {"1 slow there": 4, "1 slow back": 2}
        assert (answer["restored"], answer["tried again"], answer["foreign"]) == (True, 0, 0)
        assert answer["seconds"]["1 slow there"] >= 2 * SECONDS
        assert answer["seconds"]["1 slow back"] >= 4 * SECONDS
        assert answer["seconds"]["1 slow"] >= 6 * SECONDS
    assert first["seconds"] == second["seconds"]


def test_degrees_parts_and_ways_are_tried_where_they_fit_and_a_trial_leaves_nothing() -> None:
    for answer in run_ranks("oracles.tried:sliced", 4, None, seconds=100):
        parts = ["linear", "linear in 2", "linear in 4", "linear in 8"]
        assert answer["slices"] == [[r, way] for way in parts for r in (1, 2, 4)] + [[0, "linear"]]
        assert answer["nodes"] == [[1, way] for way in (*parts, "two-level")] + [[0, "linear"]]
        for name in ("slices", "nodes"):
            assert answer[f"{name} apart"] < 1e-12
            assert answer[f"{name} chosen"][-1] == 0
            assert answer[f"{name} random"]


def test_a_resumed_run_tries_nothing_again_and_is_the_same_to_the_bit(tmp_path) -> None:  # type: ignore[no-untyped-def]
    for trials in run_ranks(f"{resumed_runs.__module__}:resumed_runs", 2, str(tmp_path), seconds=100):
        assert trials["whole"] > 0
        assert (trials["again"], trials["linear"]) == (0, 0)
    whole, again, linear = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "again", "linear"))
    for ours, theirs, plain in zip(again, whole, linear, strict=True):
        assert {**ours, "tokens_per_second": 0} == {**theirs, "tokens_per_second": 0}
        assert theirs["loss"] == pytest.approx(plain["loss"], rel=1e-10)
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("again", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("wrong", [{"bucket": 0}, {"repeats": 0}, {"ways": {}}])
def test_what_cannot_be_measured_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"at least 1|pass transports of rows"):
        Measured(**wrong)  # type: ignore[arg-type]
