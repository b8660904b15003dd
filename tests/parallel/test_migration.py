"""Experts that change ranks, with their optimiser's state, while they learn."""

import random

import pytest
from oracles.entry import entry
from oracles.migrations import HIDDEN, RANKS, WIDTH, layer, random_placement
from oracles.ranks import run_ranks

from moestro.balance.rebalance import Rebalancer
from moestro.parallel import Placement
from moestro.parallel.moves import Move, plan_moves

BITS = [
    {"what": "keep_learning", "dtype": dtype, "slots": slots, "kernel": kernel, "times": times}
    for dtype, slots, kernel, times in (
        ("float64", 12, "auto", 100),
        ("float32", 12, "auto", 50),
        ("bfloat16", 12, "auto", 50),
        ("float32", 6, "auto", 20),
        ("float64", 8, "tiled", 20),
        ("float64", 12, "loop", 20),
        ("float32", 12, "native", 20),
        ("bfloat16", 8, "rounded", 20),
        ("float64", 12, "padded", 20),
    )
]


@entry("eplb")
def test_a_hundred_migrations_while_it_learns_change_no_bit(method):
    for answers in run_ranks("oracles.migrations:run_all", RANKS, BITS, seconds=400):
        for case, (moved, differ) in zip(BITS, answers, strict=True):
            assert moved > case["times"], case
            assert differ == 0, case


CASES = (
    {"what": "keep_learning", "dtype": "float64", "slots": 8, "kernel": "tiled", "times": 15, "sizes": (6, 5)},
    {"what": "keep_learning", "dtype": "float64", "slots": 6, "kernel": "auto", "times": 15, "sizes": (6, 5)},
    {"what": "change_replicas", "optimiser": "SGD"},
    {"what": "change_replicas", "optimiser": "Adam"},
    {"what": "pay"},
    {"what": "bring_steps"},
    {"what": "refuse"},
    {"what": "rebalance"},
)


@pytest.fixture(scope="module")
def answers():
    """What each rank answers in each case."""
    return list(zip(*run_ranks("oracles.migrations:run_all", RANKS, list(CASES)), strict=True))


@entry("eplb")
def test_odd_sizes_keep_their_bits_where_the_kernel_sees_to_it(method, answers):
    assert all(moved > 15 and differ == 0 for moved, differ in answers[0])
    assert all(moved > 15 for moved, _ in answers[1])  # other kernels: equal but for rounding, as checked there


@entry("flexmoe")
def test_replicas_that_change_at_every_step_learn_as_one_process_does(method, answers):
    assert answers[2] == answers[3] == (None, None)


@entry("smartmoe", "eplb")
def test_a_moved_expert_costs_its_weights_and_two_moments(method, answers):
    expert = 3 * WIDTH * HIDDEN * 4
    for answer in answers[4]:
        assert answer == [[2, 0, 3 * expert], [2, 0, 3 * expert], [0, 0, 0], [0, 2, 0]]


def test_experts_that_are_modules_bring_their_count_of_steps(answers):
    assert answers[5] == ([4, 2, 1], [2, 3, 3])


def test_what_cannot_move_is_refused_on_all_ranks_before_anything_moves(answers):
    for words in answers[6]:
        assert "hold experts in different states; take a step in which every expert gets a gradient" in words[0]
        assert "ranks were given different placements" in words[1]
        assert "the placements differ in slots_per_rank: 3 and 4" in words[2]


@entry("smartmoe", "flexmoe")
def test_experts_move_in_training_when_the_gain_is_worth_it(method, answers):
    first, second = answers[7]
    assert first == second  # all ranks decide alike
    moved, before, after, held = first
    assert moved[0] == moved[2] == {}
    assert moved[1][""] > 0
    assert after > max(0.9, before * 1.1)
    assert sorted(set(held)) == list(range(6))


@pytest.mark.parametrize(
    ("options", "words"),
    [({"policy": "best"}, "unknown policy 'best'"), ({"gain": 0.9}, "at least 1"), ({}, "call spread")],
)
def test_a_rebalancer_that_cannot_act_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Rebalancer(layer(), None, **options)


def test_moves_come_from_near_and_from_those_who_sent_least():
    before = Placement((0, 1, 0, 2, 0, 1, 3, 2), 4, 4)
    after = Placement((0, 0, 1, 2, 3, 1, 3, 1), 4, 4)
    moves = plan_moves(before, after, ranks_per_node=2)
    assert moves == [
        Move(0, 1),  # its own rank has it
        Move(1, 2),  # the rank beside it
        Move(6, 4),
        Move(5, 7),
    ]
    assert plan_moves(before, before) == []
    many = plan_moves(Placement((0, 0, 1, 1), 2, 4), Placement((0, 0, 0, 1), 2, 4))
    assert many == [Move(0, 2)]
    shared = plan_moves(Placement((0, 0, 1, 2), 3, 4), Placement((1, 2, 0, 0), 3, 4))
    assert {move.source for move in shared if move.target >= 2} == {0, 1}


@entry("eplb")
def test_a_thousand_random_plans_bring_every_slot_its_expert(method):
    chance = random.Random(0)
    for _ in range(1000):
        before, after = (random_placement(chance, 8) for _ in range(2))
        held = list(before.expert_of_slot)
        for move in plan_moves(before, after):
            held[move.target] = before.expert_of_slot[move.source]
        assert tuple(held) == after.expert_of_slot
