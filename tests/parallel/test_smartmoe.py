"""SmartMoE: the best placement of few experts, a pool of layouts, and experts that stay unless it pays."""

from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.entry import entry

from moestro.parallel import Cluster, LayerCost, MeshShape, Placement
from moestro.parallel.moves import plan_moves
from moestro.parallel.policies import best_placement, greedy, layout_pools, smartmoe
from moestro.parallel.policies.plain import filled


def busiest(placement, load):
    return max(placement.load_per_rank(load))


def least(load, ranks):
    """The smallest possible load of the busiest rank, by trying every order."""
    room = len(load) // ranks
    return min(max(sum(p[r * room : r * room + room]) for r in range(ranks)) for p in permutations(load))


loads = st.lists(st.integers(0, 100), min_size=6, max_size=6)


@entry("smartmoe")
@settings(max_examples=25, deadline=None, derandomize=True)
@given(load=loads, ranks=st.sampled_from([1, 2, 3, 6]))
def test_of_few_experts_the_best_of_all_placements_is_found(method, load, ranks):
    found = best_placement(np.array(load, dtype=float), ranks)
    assert busiest(found, load) == pytest.approx(least(load, ranks))
    assert busiest(smartmoe([load], Cluster(ranks)), load) == pytest.approx(least(load, ranks))


@entry("smartmoe")
@settings(max_examples=40, deadline=None, derandomize=True)
@given(load=loads, ranks=st.sampled_from([2, 3]))
def test_greedy_without_limits_is_within_four_thirds_of_the_best(method, load, ranks):
    """Graham 1969: (4/3 - 1/(3 W)), where a rank may hold any number of experts."""
    held = filled(np.array(load, dtype=float), ranks, len(load), lambda e, r, own: (sum(load[o] for o in own), r))
    ours = max(sum(load[expert] for expert in own) for own in held)
    best = min(
        max(sum(v for v, r in zip(load, where, strict=True) if r == rank) for rank in range(ranks))
        for where in np.ndindex(*[ranks] * len(load))
    )
    assert ours <= (4 / 3 - 1 / (3 * ranks)) * best + 1e-9


@entry("smartmoe")
@settings(max_examples=40, deadline=None, derandomize=True)
@given(order=st.permutations(range(8)), back=st.permutations(range(8)))
def test_experts_that_move_there_and_back_are_where_they_were(method, order, back):
    first, second = Placement(tuple(order), 8, 4), Placement(tuple(back), 8, 4)
    held = list(first.expert_of_slot)
    for before, after in ((first, second), (second, first)):
        was = list(held)
        for move in plan_moves(before, after):
            held[move.target] = was[move.source]
        assert tuple(held) == after.expert_of_slot


@entry("smartmoe")
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    load=st.lists(st.integers(0, 100), min_size=16, max_size=16),
    order=st.permutations(range(16)),
    pooled=st.permutations(range(16)),
)
def test_experts_stay_unless_the_busiest_rank_is_relieved(method, load, order, pooled):
    current, candidate = Placement(tuple(order), 16, 4), Placement(tuple(pooled), 16, 4)
    found = smartmoe([load], Cluster(4), current, pool=[candidate])
    least_of_all = min(busiest(each, load) for each in (current, candidate, greedy([load], Cluster(4), current)))
    assert busiest(found, load) == pytest.approx(least_of_all)
    if busiest(current, load) <= least_of_all:
        assert found == current


@entry("smartmoe")
def test_the_busiest_of_three_ranks_counts_and_not_the_others(method):
    for seed in range(10):
        load = np.random.default_rng(seed).integers(1, 60, 9)
        rest = [sorted(set(range(9)) - set(one)) for one in combinations(range(9), 3)]
        best = min(
            max(
                int(load.sum() - load[left].sum()),
                int(load[list(two)].sum()),
                int(load[left].sum() - load[list(two)].sum()),
            )
            for left in rest
            for two in combinations(left, 3)
        )
        assert busiest(best_placement(load.astype(float), 3), load.tolist()) == pytest.approx(best)


@entry("smartmoe")
def test_a_candidate_of_the_pool_that_greedy_does_not_find_is_taken(method):
    """Three and three against two, two and two: greedy gives one rank seven."""
    load = [3.0, 3.0, 2.0, 2.0, 2.0, *[0.0] * 9]
    candidate = Placement((0, 1, 5, 6, 7, 8, 9, 2, 3, 4, 10, 11, 12, 13), 14, 2)
    assert busiest(smartmoe([load], Cluster(2)), load) == 7
    assert smartmoe([load], Cluster(2), pool=[candidate]) == candidate


@entry("smartmoe")
def test_ranks_keep_what_they_can_of_the_best_placement(method):
    load = np.array([9.0, 8.0, 3.0, 1.0, 1.0, 0.5])
    first = best_placement(load, 3)
    held = [first.experts_of(rank) for rank in (2, 0, 1)]
    found = best_placement(load, 3, Placement(tuple(expert for rank in held for expert in rank), 6, 3))
    assert [set(found.experts_of(rank)) for rank in range(3)] == [set(rank) for rank in held]


def cost(**sizes):
    return LayerCost(**{"width": 256, "parameters": 2 * 256 * 512, "number_bytes": 4} | sizes)


@entry("smartmoe")
def test_layouts_are_ordered_by_what_the_loads_make_them_cost(method):
    even, hot = np.full((40, 8), 4096.0), np.tile([29e3, 500.0, 500.0, 500.0, 500.0, 500.0, 500.0, 768.0], (40, 1))
    dear_products = cost(flops=1e9)
    shapes = {pool.shape: pool for pool in layout_pools(even, 4, dear_products)}
    assert set(shapes) == {
        MeshShape(data=d, expert=e, tensor=t)
        for d in (1, 2, 4)
        for e in (1, 2, 4)
        for t in (1, 2, 4)
        if d * e * t == 4
    }
    assert all(pool.imbalance == pytest.approx(1) for pool in shapes.values())
    skewed = layout_pools(hot, 4, dear_products)
    assert skewed[0].shape.expert == 1  # nobody waits where every rank has all experts
    assert skewed[-1].shape.expert == 4  # with one hot expert on one rank of four the others wait
    assert skewed[-1].imbalance == pytest.approx(4 * 29.5e3 / hot[0].sum())
    dear_gradients = cost(flops=1e18, between=1e6, inside=1e6, parameters=10**8)
    assert layout_pools(even, 4, dear_gradients)[0].shape.data == 1  # gradients over data cost more than rows


@entry("smartmoe")
def test_a_layout_costs_what_the_closed_form_says(method):
    load, sizes = np.full((4, 8), 100.0), cost(flops=1e9, inside=1e6, between=1e5)
    pools = {pool.shape: pool.seconds for pool in layout_pools(load, 4, sizes, nodes=2)}
    row, expert = 256 * 4, 2 * 256 * 512 * 4
    products = 6 * 2 * 256 * 512 / 1e9
    assert pools[MeshShape(expert=4)] == pytest.approx(200 * products + 4 * 200 * row * 3 / 4 / 1e5)
    # two copies of pairs, each within a node, whose gradients cross: 4 experts, half of them twice
    assert pools[MeshShape(data=2, expert=2)] == pytest.approx(
        200 * products + 4 * 200 * row / 2 / 1e6 + 2 * 4 * expert / 2 / 1e5
    )
    assert pools[MeshShape(expert=2, tensor=2)] == pytest.approx(
        400 * products / 2 + 4 * 200 * row / 2 / 1e5 + 4 * 400 * row / 2 / 1e6
    )


@entry("smartmoe")
def test_the_pool_of_a_layout_holds_a_placement_for_every_phase(method):
    day, night = [9.0, 9.0, 1.0, 1.0], [1.0, 9.0, 9.0, 1.0]
    (pool,) = (p for p in layout_pools([day] * 4 + [night] * 4, 2, cost(), parts=2) if p.shape.expert == 2)
    assert len(pool.placements) == 2
    for load in (day, night):
        chosen = smartmoe([load], Cluster(2), Placement.contiguous(4, 2), pool=pool.placements)
        assert busiest(chosen, load) == 10


@pytest.mark.parametrize("loads", [np.zeros((8, 4)), np.ones((3, 4))])
def test_pools_of_nothing_are_refused(loads):
    with pytest.raises(ValueError, match="do not make 4 parts"):
        layout_pools(loads, 2, cost())
