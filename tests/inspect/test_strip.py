import pytest

from moestro.inspect import load_strip


def test_fair_share_fills_half_a_block():
    assert load_strip([0.25] * 4) == "▄▄▄▄"


def test_twice_the_fair_share_and_more_is_full():
    assert load_strip([0.5, 0.25, 0.25, 0.0]) == "█▄▄▁"
    assert load_strip([1.0, 0.0, 0.0, 0.0]) == "█▁▁▁"


def test_only_proportions_count():
    assert load_strip([10, 20, 30]) == load_strip([1 / 6, 2 / 6, 3 / 6])


@pytest.mark.parametrize(
    ("shares", "strip"), [([], ""), ([0.0, 0.0], "▁▁"), ([float("nan")] * 2, "▁▁"), ([1], "▄")]
)
def test_odd_inputs(shares, strip):
    assert load_strip(shares) == strip


def test_many_experts_are_averaged_in_groups():
    strip = load_strip([2.0] * 50 + [0.0] * 50, width=10)
    assert strip == "█" * 5 + "▁" * 5
    assert len(load_strip([1.0] * 257)) == 64
