"""Policies against each other, against experts in order and against the best of all placements."""

from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.entry import entry

from moestro.parallel import POLICIES, Cluster, Placement, eplb, policy_gains
from moestro.parallel.policies import REPLICATING, anti_correlation, exchanged, greedy, refined


def busiest(placement, load):
    return max(placement.load_per_rank(load))


def best_of_all(load, ranks):
    """The smallest possible load of the busiest rank, without replicas."""
    size = len(load) // ranks
    return min(max(sum(p[r * size : r * size + size]) for r in range(ranks)) for p in permutations(load))


@entry("eplb")
def test_a_thousand_random_loads_are_never_worse_than_eplb_greedy_or_order(method):
    chance, worse, gained = np.random.default_rng(0), 0, []
    for _ in range(1000):
        ranks = int(chance.integers(2, 5))
        experts = ranks * int(chance.integers(2, 5))
        load = (
            chance.pareto(1.0, experts) if chance.random() < 0.5 else chance.integers(0, 50, experts).astype(float)
        )
        slots = experts + ranks * int(chance.integers(0, 3))
        ours = busiest(refined([load], Cluster(ranks, slots)), load)
        theirs = busiest(eplb(load, ranks=ranks, slots=slots), load)
        order = busiest(Placement.contiguous(experts, ranks), load)
        assert ours <= theirs * (1 + 1e-9)
        if slots == experts:
            assert ours <= min(order, busiest(greedy([load], Cluster(ranks)), load)) * (1 + 1e-9)
        assert ours >= max(sum(load) / ranks, 0) * (1 - 1e-9)
        worse += theirs > order
        gained.append(theirs / ours if ours else 1)
    assert 0 < worse < 100  # EPLB alone is worse than experts in order now and then
    assert np.mean(gained) > 1.01


@entry("eplb", "smartmoe", "moe-deploy-placement")
def test_policies_stay_near_the_best_of_all_placements(method):
    chance, ratios = np.random.default_rng(1), {"greedy": [], "refined": []}
    for _ in range(40):
        load = chance.integers(1, 100, 6).tolist()
        best = best_of_all(load, 2)
        for name, seen in ratios.items():
            seen.append(busiest(POLICIES[name]([load], Cluster(2)), load) / best)
    assert min(ratios["greedy"]) == min(ratios["refined"]) == pytest.approx(1)
    assert max(ratios["greedy"]) < 4 / 3 - 1 / 6
    assert np.mean(ratios["refined"]) < np.mean(ratios["greedy"]) < 1.05


@st.composite
def tasks(draw):
    """A history, a cluster that it fits, and perhaps where experts are."""
    ranks = draw(st.sampled_from([1, 2, 3, 4]))
    experts = ranks * draw(st.integers(1, 4))
    slots = experts + ranks * draw(st.integers(0, 3))
    history = draw(
        st.lists(st.lists(st.integers(0, 500), min_size=experts, max_size=experts), min_size=1, max_size=4)
    )
    held = [*range(experts), *(draw(st.integers(0, experts - 1)) for _ in range(slots - experts))]
    current = Placement(tuple(draw(st.permutations(held))), experts, ranks)
    return history, Cluster(ranks, slots), draw(st.sampled_from([None, current]))


@entry("eplb", "flexmoe", "smartmoe", "moe-deploy-placement")
@settings(max_examples=25, deadline=None, derandomize=True)
@given(task=tasks())
def test_every_policy_keeps_every_expert_and_fills_every_slot(method, task):
    history, cluster, current = task
    experts = len(history[0])
    for name, policy in POLICIES.items():
        if name not in REPLICATING and cluster.slots != experts:
            continue
        found = policy(history, cluster, current)
        assert found == policy(history, cluster, current), name  # the same on every rank
        assert len(found.expert_of_slot) == cluster.slots, name
        assert found.ranks == cluster.ranks, name
        assert set(found.expert_of_slot) == set(range(experts)), name


@entry("moe-deploy-placement")
def test_with_loads_that_never_change_anti_correlation_is_greedy(method):
    for seed in range(20):
        load = np.random.default_rng(seed).random(8)
        history = np.repeat(load[None], 5, axis=0)
        assert anti_correlation(history, Cluster(4)) == greedy(history, Cluster(4))


def objective(held, shares):
    """Largest deviation of a rank's share from even, over batches: what Huang et al. minimise."""
    return max(abs(shares[:, list(rank)].sum(1) - 1 / len(held)).max() for rank in held)


@entry("moe-deploy-placement")
def test_experts_that_are_busy_together_are_kept_apart(method):
    chance = np.random.default_rng(0)
    phase = chance.random((40, 1)) > 0.5
    together = np.where(phase, 3.0, 1.0) * np.array([[1.0, 1.0]])
    other = np.where(phase, 1.0, 3.0) * np.array([[1.0, 1.0]])
    history = np.concatenate([together, other], 1) + 0.01 * chance.random((40, 4))
    shares = history / history.sum(1, keepdims=True)
    placement = anti_correlation(history, Cluster(2))
    held = [placement.experts_of(rank) for rank in range(2)]
    assert all(len({0, 1} & set(rank)) == 1 for rank in held)
    pairs = [(pair, tuple({0, 1, 2, 3} - set(pair))) for pair in combinations(range(4), 2)]
    assert objective(held, shares) <= min(objective(pair, shares) for pair in pairs) + 0.02  # of every placement


@entry("smartmoe")
def test_equal_choices_leave_experts_where_they_are(method):
    current = Placement((3, 1, 2, 0), 4, 2)
    moved = greedy([[1, 1, 1, 1]], Cluster(2), current)
    assert [set(moved.experts_of(rank)) for rank in range(2)] == [{3, 1}, {2, 0}]
    assert refined([[1, 1, 1, 1]], Cluster(2), current) == current


def test_exchanges_only_ever_relieve_the_busiest():
    placement = Placement((0, 1, 2, 3), 4, 2)
    load = [8.0, 7.0, 2.0, 1.0]
    better = exchanged(placement, load)
    assert busiest(better, load) == 9
    assert exchanged(better, load) == better
    assert exchanged(Placement((0,), 1, 1), [3.0]) == Placement((0,), 1, 1)


def test_gains_are_of_steps_that_the_policy_had_not_seen():
    first, second = [4.0, 4.0, 1.0, 1.0], [1.0, 4.0, 1.0, 4.0]
    gains = {g.policy: g for g in policy_gains([first] * 4 + [second] * 4, Cluster(2), predictor="last")}
    assert gains["contiguous"].balancedness == gains["contiguous"].hindsight == pytest.approx(1.0)
    assert gains["contiguous"].speedup == 1
    assert gains["contiguous"].moved == 0
    assert gains["greedy"].placement.experts_of(0) == (0, 3)  # even for what it saw, and for what came
    assert gains["greedy"].moved == 2
    unlucky = {g.policy: g for g in policy_gains([second] * 4 + [[4.0, 4.0, 4.0, 1.0]] * 4, Cluster(2))}
    assert unlucky["refined"].balancedness <= unlucky["refined"].hindsight


def test_replicas_even_out_one_hot_expert():
    gains = {g.policy: g for g in policy_gains([[10.0, 1.0, 1.0, 2.0]] * 6, Cluster(2, slots=6))}
    assert gains["greedy"].balancedness == pytest.approx(7 / 11)
    assert gains["eplb-global"].balancedness == pytest.approx(7 / (20 / 3 + 1))
    assert gains["refined"].speedup > 1.4


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: policy_gains([[1, 1]], Cluster(2)), "cannot be split"),
        (lambda: policy_gains([[1, 1]] * 4, Cluster(2), predictor="oracle"), "unknown 'oracle'; there are last"),
        (lambda: policy_gains([[1, 1]] * 4, Cluster(2), policies=["best"]), "unknown 'best'"),
        (lambda: greedy([[1, 1, 1]], Cluster(2)), "3 experts cannot be shared evenly by 2 ranks"),
        (lambda: greedy([1, 2], Cluster(2)), r"\[steps, experts\]"),
        (lambda: anti_correlation([[1, -1]], Cluster(2)), "not negative"),
        (lambda: Placement.contiguous(4, 2).load_per_rank([1.0]), "does not fit"),
    ],
)
def test_what_cannot_be_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_no_policy_sees_what_it_is_measured_on():
    first, *later = np.random.default_rng(0).random((3, 20, 8))
    tried = [policy_gains(np.concatenate([first, each]), Cluster(4, slots=12)) for each in later]
    for one, other in zip(*tried, strict=True):
        assert one.placement == other.placement, one.policy
        assert one.balancedness != other.balancedness
