"""Which experts are worth a shadow. What shadows compute is held to one process in `test_exactness.py`."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.entry import entry
from oracles.wire_bytes import HIDDEN, WIDTH, Form

from moestro.parallel.transports import Shadow
from moestro.parallel.transports.shadow import shadowed


@entry("fastermoe-shadow")
@pytest.mark.parametrize("per_rank", [1, 2])
def test_an_even_load_has_no_shadow(method, per_rank):
    assert shadowed([[50] * per_rank] * 4, row_seconds=1.0, shadow_seconds=1e-9) == []


@entry("fastermoe-shadow")
def test_one_hot_expert_whose_weights_are_cheap_has_the_only_shadow(method):
    assert shadowed([[10], [200], [10], [10]], row_seconds=1.0, shadow_seconds=5.0) == [1]
    assert shadowed([[10], [200], [10], [10]], row_seconds=1.0, shadow_seconds=191.0) == []
    assert shadowed([[10, 0], [10, 200]], row_seconds=1.0, shadow_seconds=5.0) == [3]
    assert shadowed([[0], [0]], row_seconds=1.0, shadow_seconds=5.0) == []


@entry("fastermoe-shadow")
@settings(max_examples=100, deadline=None, derandomize=True)
@given(load=st.lists(st.integers(0, 300), min_size=2, max_size=8), shadow=st.integers(1, 200))
def test_with_one_expert_on_a_rank_it_is_the_prefix_of_the_paper(method, load, shadow):
    """lat = r B_1; accept the i-th hottest while r B_(i+1) + i t_m < lat; the last one of all leaves nothing."""
    hottest = sorted(range(len(load)), key=lambda e: (-load[e], e))
    count, latency = 0, load[hottest[0]]
    while count < len(load):
        rest = load[hottest[count + 1]] if count + 1 < len(load) else 0
        if not load[hottest[count]] or rest + (count + 1) * shadow >= latency:
            break
        count, latency = count + 1, rest + (count + 1) * shadow
    assert shadowed([[each] for each in load], 1.0, shadow) == sorted(hottest[:count])


@entry("fastermoe-shadow")
def test_the_bytes_that_are_tested_are_those_of_shadows(method):
    """An expert's weights to every other rank and back, instead of its rows: 2 d b each, forward and backward."""
    sizes = {"ranks": 4, "per_node": 2, "experts": 8, "top_k": 3, "tokens": 8, "bytes": 4, "load": "uneven"}
    shadow, linear = (Form({"transport": name, **sizes}) for name in ("shadow 1e15", "linear"))
    hot = shadow.shadows()
    assert 0 < len(hot) < 8
    total: Counter[str] = Counter()
    for sign, form in ((1, shadow), (-1, linear)):
        for rank in range(4):
            for (name, _, link), n in form.at(rank).items():
                total[name] += sign * n * (link != "self")
    away = sum(e in hot and e // 2 != rank for rank, tokens in enumerate(shadow.choices) for c in tokens for e in c)
    assert total["dispatch"] == total["combine"] == -2 * away * WIDTH * 4
    assert total["experts"] == 2 * len(hot) * 3 * 2 * WIDTH * HIDDEN * 4


def test_speeds_that_are_none_are_refused():
    with pytest.raises(ValueError, match="must be above 0"):
        Shadow(bandwidth=0)
