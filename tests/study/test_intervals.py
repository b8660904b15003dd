"""Intervals against scipy and on paper."""

import pytest
from scipy import stats

from moestro.study.intervals import interval, least_significant_difference, student_quantile


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 8, 30])
@pytest.mark.parametrize("probability", [0.6, 0.9, 0.975, 0.9995])
def test_the_quantile_is_that_of_student(degrees, probability):
    assert student_quantile(probability, degrees) == pytest.approx(stats.t.ppf(probability, degrees), rel=1e-9)


def test_the_interval_of_three_values():
    found = interval([1.0, 2.0, 3.0])
    low, high = stats.t.interval(0.95, 2, loc=2, scale=stats.sem([1.0, 2.0, 3.0]))
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((low, high))
    assert found.holds_zero is True
    assert interval([1.0, 1.1, 0.9]).holds_zero is False


def test_one_value_has_no_interval():
    assert interval([4.0]).half_width is None
    assert interval([4.0]).holds_zero is None


@pytest.mark.parametrize(("probability", "degrees"), [(0.4, 3), (1.0, 3), (0.9, 0)])
def test_what_has_no_quantile_is_refused(probability, degrees):
    with pytest.raises(ValueError, match="probability < 1"):
        student_quantile(probability, degrees)


def test_the_least_significant_difference_is_that_of_a_paired_t_test_with_two_methods():
    """With two rows, the residuals of methods and seeds are half the deviations of the paired differences."""
    table = [[1.0, 2.1, 2.9, 4.2], [1.5, 2.2, 3.6, 4.4]]
    differences = [a - b for a, b in zip(*table, strict=True)]
    assert least_significant_difference(table) == pytest.approx(interval(differences).half_width)


def test_seeds_that_shift_every_method_alike_are_no_noise():
    assert least_significant_difference([[1.0, 2.0, 4.0], [1.5, 2.5, 4.5], [0.0, 1.0, 3.0]]) == pytest.approx(0)


def test_one_seed_has_no_least_significant_difference():
    assert least_significant_difference([[1.0], [2.0]]) is None
    assert least_significant_difference([]) is None
