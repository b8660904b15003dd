"""What moving experts gained, from routing records and events."""

import pytest

from moestro.inspect.history import histories
from moestro.inspect.moved import moved_experts


def records(loads):
    return [{"step": step, "layers": [{"name": "layers.0.moe", "load": load}]} for step, load in loads.items()]


def event(step, slots, moved=2, ranks=2):
    layer = {"layer": "layers.0.moe", "ranks": ranks, "slots": slots, "moved": moved, "bytes": 100 * moved}
    return {"step": step, "event": "placement", "layers": [layer]}


def test_the_load_is_that_of_the_placement_that_held_at_the_step():
    layers = histories(records({5: [4, 4, 1, 1], 10: [4, 4, 1, 1], 15: [4, 4, 1, 1], 20: [1, 4, 4, 1]}))
    found = moved_experts(
        layers, [event(10, [0, 2, 1, 3]), {"step": 12, "event": "loss spike"}, event(15, [0, 1, 2, 3])]
    )
    assert (found.decisions, found.moved, found.num_bytes) == (2, 4, 400)
    assert found.steps == [15, 20]  # what is decided after step 10 holds from step 11 on
    assert found.placed == pytest.approx([1.0, 1.0])
    assert found.in_order == pytest.approx([1.6, 1.0])
    assert found.gains == pytest.approx((1.0, 1.3))


def test_replicas_share_the_load():
    layers = histories(records({1: [3, 1], 2: [3, 1]}))
    found = moved_experts(layers, [event(1, [0, 0, 0, 1])])
    assert found.in_order == pytest.approx([1.0])  # both experts on both ranks
    assert found.placed == pytest.approx([1.0])


def test_where_nothing_moved_there_is_nothing_to_say():
    layers = histories(records({1: [3, 1]}))
    assert moved_experts(layers, []) is None
    assert moved_experts(layers, [{"step": 1, "event": "loss spike"}]) is None
    assert moved_experts(layers, [event(1, [1, 0])]) is None  # no record since
    assert moved_experts([], [event(1, [1, 0])]) is None
