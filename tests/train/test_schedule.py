"""Schedules: their values at the ends and the corners, known on paper."""

import itertools

import pytest

from moestro.train.schedule import schedule


def shares(name, steps=100, **options):
    share = schedule(name, steps=steps, **options)
    return [share(t) for t in range(steps)]


@pytest.mark.parametrize("name", ["cosine", "wsd", "constant"])
def test_warmup_is_a_straight_line_to_the_peak(name):
    values = shares(name, warmup_fraction=0.1)
    assert values[:11] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0])


def test_cosine_passes_the_middle_half_way_and_ends_at_the_final_share():
    values = shares("cosine", steps=101, warmup_fraction=0, final_fraction=0.2)
    assert (values[0], values[50], values[100]) == pytest.approx((1.0, 0.6, 0.2))


def test_wsd_is_flat_then_falls_in_a_straight_line_over_the_decay():
    values = shares("wsd", steps=101, warmup_fraction=0, decay_fraction=0.25, final_fraction=0.0)
    assert values[74] == 1.0  # the decay takes a quarter of 101 steps: it starts after step 100 - 25.25
    assert values[75] < 1.0
    assert values[-1] == pytest.approx(0.0, abs=1e-12)
    falls = [a - b for a, b in itertools.pairwise(values[80:])]
    assert falls == pytest.approx([falls[0]] * len(falls))


def test_constant_stays():
    assert set(shares("constant", warmup_fraction=0)) == {1.0}


@pytest.mark.parametrize("name", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs_have_a_learning_rate(name, steps):
    assert all(0 < value <= 1 for value in shares(name, steps=steps, warmup_fraction=0.5))
