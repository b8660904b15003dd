"""FlexMoE's changes: each makes a step cheaper, and none is made where nothing is to be gained."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.entry import entry

from moestro.parallel import Cluster, LayerCost, Placement
from moestro.parallel.costs import holders
from moestro.parallel.policies import flexmoe
from moestro.parallel.policies.flexmoe import changes, uneven

CHEAP = LayerCost(width=64, parameters=100)  # an expert's gradient costs next to nothing
DEAR = LayerCost(width=64, parameters=10**9)


def seconds(placement, load, cost, nodes):
    """The cost model, written out from who sends what to whom."""
    ranks, per_node = placement.ranks, placement.ranks // nodes
    share = [each / count for each, count in zip(load, placement.num_replicas, strict=True)]
    worst = 0.0
    for rank in range(ranks):
        rows = sum(share[expert] for expert in placement.experts_of(rank))
        total = 3 * 2 * cost.parameters * rows / cost.flops
        for other in range(ranks):
            speed = cost.inside if other // per_node == rank // per_node else cost.between
            total += 0 if other == rank else 4 * rows / ranks * cost.width * cost.number_bytes / speed
        worst = max(worst, total)
    for ranks_of in holders(placement):
        speed = cost.inside if len({rank // per_node for rank in ranks_of}) == 1 else cost.between
        count = len(ranks_of)
        worst += 2 * (count - 1) / count * cost.parameters * cost.number_bytes / speed
    return worst


@st.composite
def situations(draw):
    ranks = draw(st.sampled_from([2, 4]))
    nodes = draw(st.sampled_from([1, 2]))
    per_rank = draw(st.integers(1, 4))
    experts = draw(st.integers(max(1, ranks * per_rank // 3), ranks * per_rank))
    load = draw(st.lists(st.integers(0, 1000), min_size=experts, max_size=experts))
    held = [*range(experts), *(draw(st.integers(0, experts - 1)) for _ in range(ranks * per_rank - experts))]
    placement = Placement(tuple(draw(st.permutations(held))), experts, ranks)
    cost = LayerCost(width=64, parameters=draw(st.sampled_from([1, 10**4, 10**9])), between=1e9)
    return placement, np.array(load, dtype=float), Cluster(ranks, ranks * per_rank, nodes, cost=cost)


@entry("flexmoe")
@settings(max_examples=60, deadline=None, derandomize=True)
@given(situation=situations())
def test_every_change_makes_a_step_cheaper_and_all_slots_stay_full(method, situation):
    placement, load, cluster = situation
    before = seconds(placement, load, cluster.cost, cluster.nodes)
    assert cluster.cost.seconds(placement, load.tolist(), cluster.nodes) == pytest.approx(before)
    for after in changes(placement, load, cluster, 1.1):
        now = seconds(after, load, cluster.cost, cluster.nodes)
        assert now < before
        assert sum(after.num_replicas) == cluster.slots
        before = now
    assert flexmoe([load], cluster, placement).slots_per_rank == placement.slots_per_rank


@entry("flexmoe")
def test_an_even_load_changes_nothing(method):
    placement = Placement.in_turn(8, 4, 16)
    assert flexmoe([[7.0] * 8], Cluster(4, 16, cost=CHEAP), placement) == placement
    apart = Placement(
        (0, 1, 1, 0), 2, 2
    )  # below the threshold nothing moves, though bringing replicas together paid
    assert flexmoe([[1000.0, 950.0]], Cluster(2, 4, cost=DEAR), apart) == apart


@entry("flexmoe")
def test_a_hot_expert_grows_and_cold_ones_shrink(method):
    load = [900.0, 100.0, 100.0, 100.0]
    start = Placement((0, 1, 2, 3, 1, 2, 3, 0), 4, 4)
    found = flexmoe([load], Cluster(4, 8, cost=CHEAP), start)
    assert found.num_replicas[0] == 4
    assert not uneven(found, np.array(load), 1.1)
    assert max(found.load_per_rank(load)) < max(start.load_per_rank(load))


@entry("flexmoe")
def test_gradients_that_cost_more_than_waiting_bring_replicas_together(method):
    apart, load = Placement((0, 1, 2, 3, 0, 1, 2, 3), 4, 4), np.array([900.0, 100.0, 100.0, 100.0])
    *_, found = changes(apart, load, Cluster(4, 8, nodes=2, cost=DEAR), threshold=9.0)  # too high to expand
    assert all(len(ranks) == 1 for ranks in holders(found))  # nothing is left to add up


@entry("flexmoe")
def test_without_replicas_an_exchange_is_all_there_is(method):
    load = [4.0, 3.0, 2.0, 1.0]
    found = flexmoe([load], Cluster(2, cost=CHEAP), Placement.contiguous(4, 2))
    assert max(found.load_per_rank(load)) == min(max(sum(pair), 10 - sum(pair)) for pair in combinations(load, 2))


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"threshold=0\.5 must be at least 1"):
        flexmoe([[1.0, 1.0]], Cluster(2), threshold=0.5)
    with pytest.raises(ValueError, match="use 4 or 6 slots"):
        flexmoe([[1.0, 1.0, 1.0]], Cluster(2, 5))
    with pytest.raises(ValueError, match="must be above 0"):
        LayerCost(flops=0)
