"""DeepSeek's balancer: the published example, random loads against identity and the best of all placements."""

import numpy as np
import pytest
from oracles.entry import entry

from moestro.parallel import eplb
from moestro.parallel.eplb import pack, replicate

PUBLISHED = (
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
)
ANSWER = (
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
)


@entry("eplb")
@pytest.mark.parametrize("layer", [0, 1])
def test_the_published_example_has_the_published_answer(method, layer):
    placement = eplb(PUBLISHED[layer], ranks=8, slots=16, nodes=2, groups=4)
    assert list(placement.expert_of_slot) == ANSWER[layer]
    busiest = max(placement.load_per_rank(PUBLISHED[layer])) / np.mean(placement.load_per_rank(PUBLISHED[layer]))
    assert busiest == pytest.approx([1.208, 1.242][layer], abs=5e-4)
    everywhere = eplb(PUBLISHED[layer], ranks=8, slots=16, nodes=2, groups=1)  # one group on two nodes: global
    assert 1 / everywhere.balancedness(PUBLISHED[layer]) == pytest.approx([1.073, 1.190][layer], abs=5e-4)


def slow_answer(load, slots, nodes, groups, ranks):
    """The same rules once more, on dictionaries."""
    load = [np.float32(x) for x in load]

    def spread(weight, bins):
        room, bags = len(weight) // bins, {b: [] for b in range(bins)}
        sums = {b: np.float32(0) for b in range(bins)}
        if room == 1:
            return {b: [name] for b, name in zip(range(bins), weight, strict=True)}
        order = list(weight)
        for name in sorted(weight, key=lambda n: (-weight[n], order.index(n))):
            best = min((b for b in bags if len(bags[b]) < room), key=lambda b: (sums[b], b))
            bags[best].append(name)
            sums[best] = np.float32(sums[best] + weight[name])
        return bags

    size = len(load) // groups
    heavy = {g: np.float32(np.sum(np.array(load[g * size : g * size + size]))) for g in range(groups)}
    answer = []
    for bag in spread(heavy, nodes).values():
        experts = [g * size + i for g in bag for i in range(size)]
        count, copies = dict.fromkeys(experts, 1), [(e, 0) for e in experts]
        while len(copies) < slots // nodes:
            most = max(experts, key=lambda e: (load[e] / np.float32(count[e]), -experts.index(e)))
            copies.append((most, count[most]))
            count[most] += 1
        weight = {copy: load[copy[0]] / np.float32(count[copy[0]]) for copy in copies}
        answer += [expert for bag in spread(weight, ranks // nodes).values() for expert, _ in bag]
    return answer


@entry("eplb")
def test_a_thousand_random_loads_are_spread_by_the_rules(method):
    chance = np.random.default_rng(0)
    for _ in range(1000):
        nodes, groups = (int(chance.choice([1, 2])) for _ in range(2))
        ranks, per_group = nodes * int(chance.integers(1, 4)), 4
        groups *= 2
        experts = groups * per_group
        while experts % ranks:
            ranks += nodes
        slots = experts + ranks * int(chance.integers(0, 3))
        load = chance.pareto(1.0, experts).round(int(chance.integers(0, 3)))
        placement = eplb(load, ranks=ranks, slots=slots, nodes=nodes, groups=groups)
        assert list(placement.expert_of_slot) == slow_answer(load, slots, nodes, groups, ranks)


def test_equal_weights_are_taken_in_order_and_one_item_each_stays():
    assert pack([1, 1, 1, 1], 2) == [[0, 2], [1, 3]]
    assert pack([1, 9, 5], 3) == [[0], [1], [2]]
    assert replicate([4, 8, 2], 5) == [0, 1, 2, 1, 0]
    assert replicate([1, 1], 4) == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("load", "sizes", "words"),
    [
        ([1, 2, 3], {"ranks": 2}, "3 slots cannot be shared evenly by 2 ranks; 4 could"),
        ([1, 2, 3, 4], {"ranks": 2, "slots": 3}, "pass at least 4"),
        ([1, 2, 3], {"ranks": 2, "slots": 4, "groups": 2}, "3 experts cannot be shared evenly by 2 groups"),
        ([1, 2, 3, 4], {"ranks": 1, "nodes": 2, "groups": 2}, "1 ranks cannot be shared evenly by 2 nodes"),
        ([1, -2], {"ranks": 1}, "not negative"),
        ([1, float("nan")], {"ranks": 1}, "finite"),
        ([[1.0]], {"ranks": 1}, "one number for each expert"),
        ([1.0], {"ranks": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_is_refused(load, sizes, words):
    with pytest.raises(ValueError, match=words):
        eplb(load, **sizes)
