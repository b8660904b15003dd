"""Experts of consecutive layers that tokens use together share a rank."""

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.entry import entry
from scipy.optimize import linear_sum_assignment

from moestro.parallel import Cluster, Placement
from moestro.parallel.assignment import balanced_assignment
from moestro.parallel.policies import exflow, moving_share, pair_counts


def trace_of(chance, layers, tokens, experts, affinity=0.7):
    """Tokens that mostly follow a hidden permutation from layer to layer."""
    trace = [chance.integers(0, experts, tokens)]
    for _ in range(layers - 1):
        follow = chance.permutation(experts)[trace[-1]]
        trace.append(np.where(chance.random(tokens) < affinity, follow, chance.integers(0, experts, tokens)))
    return np.stack(trace)


def moves_of_tokens(trace, placements):
    """Steps from layer to layer that change the rank, token by token."""
    where = [
        [placement.slots_of(e)[0] // placement.slots_per_rank for e in range(placement.num_experts)]
        for placement in placements
    ]
    return sum(
        where[layer][trace[layer][token]] != where[layer + 1][trace[layer + 1][token]]
        for layer in range(len(trace) - 1)
        for token in range(len(trace[0]))
    )


@entry("exflow")
def test_pair_counts_say_what_tokens_do(method):
    chance = np.random.default_rng(0)
    trace = trace_of(chance, 4, 200, 8)
    pairs = pair_counts(trace, 8)
    for _ in range(10):
        placements = [Placement(tuple(chance.permutation(8).tolist()), 8, 4) for _ in range(4)]
        share, far = moving_share(pairs, placements, nodes=2)
        assert share == pytest.approx(moves_of_tokens(trace, placements) / (3 * 200))
        by_node = [Placement(placement.expert_of_slot, 8, 2) for placement in placements]
        assert far == pytest.approx(moves_of_tokens(trace, by_node) / (3 * 200))


def halves(experts):
    return [
        Placement((*held, *sorted(set(range(experts)) - set(held))), experts, 2)
        for held in combinations(range(experts), experts // 2)
    ]


@entry("exflow")
def test_of_few_experts_the_best_of_all_placements_is_found(method):
    for seed in range(15):
        chance = np.random.default_rng(seed)
        pairs = pair_counts(trace_of(chance, 3, 60, 4, affinity=0.5), 4)
        best = min(moving_share(pairs, each)[0] for each in product(halves(4), repeat=3))
        assert moving_share(pairs, exflow(pairs, Cluster(2)))[0] == pytest.approx(best)


@entry("exflow")
@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), nodes=st.sampled_from([1, 2]))
def test_it_never_costs_more_than_where_experts_are(method, seed, nodes):
    chance = np.random.default_rng(seed)
    pairs = pair_counts(trace_of(chance, 3, 40, 8, affinity=chance.random()), 8)
    current = [Placement(tuple(chance.permutation(8).tolist()), 8, 4) for _ in range(3)]
    for start in (None, current):
        found = exflow(pairs, Cluster(4, nodes=nodes), start, starts=1)
        before = start or [Placement.contiguous(8, 4)] * 3
        assert sum(moving_share(pairs, found, nodes)) <= sum(moving_share(pairs, before, nodes)) + 1e-12
        assert all(sorted(placement.expert_of_slot) == list(range(8)) for placement in found)


@entry("exflow")
def test_a_hidden_chain_is_found_over_nodes_and_ranks(method):
    chance = np.random.default_rng(5)
    pairs = pair_counts(trace_of(chance, 6, 2000, 16, affinity=1.0), 16)
    found = exflow(pairs, Cluster(4, nodes=2))
    assert moving_share(pairs, found, 2) == (0, 0)
    assert moving_share(pairs, [Placement.contiguous(16, 4)] * 6)[0] > 0.6


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6), items=st.sampled_from([(4, 2), (6, 3), (12, 4), (5, 1), (6, 6)]), ties=st.booleans()
)
def test_assignments_are_as_good_as_scipys(seed, items, ties):
    chance = np.random.default_rng(seed)
    value = chance.integers(0, 4, items).astype(float) if ties else chance.normal(size=items)
    found, room = balanced_assignment(value), items[0] // items[1]
    assert np.bincount(found, minlength=items[1]).tolist() == [room] * items[1]
    rows, columns = linear_sum_assignment(np.repeat(value, room, axis=1), maximize=True)
    assert value[np.arange(items[0]), found].sum() == pytest.approx(value[rows, columns // room].sum())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: pair_counts([[0, 1]], 2), "two layers at least"),
        (lambda: pair_counts([[0], [2]], 2), "names experts 0 to 2, but there are 2"),
        (lambda: exflow(np.ones((2, 2)), Cluster(2)), "from pair_counts"),
        (lambda: exflow(np.ones((1, 4, 4)), Cluster(2, slots=6)), "leave slots out"),
        (lambda: exflow(np.ones((1, 4, 4)), Cluster(3)), "4 experts cannot be shared evenly by 3 ranks"),
        (lambda: exflow(np.ones((1, 4, 4)), Cluster(2, nodes=4)), "2 ranks cannot be shared evenly by 4 nodes"),
        (lambda: balanced_assignment(np.ones((3, 2))), "3 items cannot be shared evenly by 2 bins"),
        (lambda: moving_share(np.ones((1, 2, 2)), [Placement((0, 1, 0, 1), 2, 2)] * 2), "without replicas"),
    ],
)
def test_what_cannot_be_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
