"""Linear algebra over many rows, against loops and the whole."""

import mpmath
import numpy as np
import pytest
from oracles.planted_mixtures import crossing_lines

from moestro.mixtures.gates import softmax
from moestro.mixtures.gates.base import Effort
from moestro.mixtures.gates.families import FAMILIES
from moestro.mixtures.gates.softmax import SoftmaxGate
from moestro.mixtures.numerics import draw_labels, gamma_peak, weighted_gram
from moestro.mixtures.rows import Rows, Scaling, with_intercept


@pytest.mark.parametrize("rows", [1, 5, 2048, 5000])  # within, at and beyond a block
def test_weighted_grams_are_sums_over_all_rows(rows):
    rng = np.random.default_rng(rows)
    z, weights = rng.standard_normal((rows, 3)), rng.random((rows, 2))
    expected = np.einsum("tk,tp,tq->kpq", weights, z, z)
    np.testing.assert_allclose(weighted_gram(z, weights), expected, atol=1e-9)
    np.testing.assert_allclose(weighted_gram(z, lambda here: weights[here]), expected, atol=1e-9)


def test_labels_are_drawn_by_their_probabilities():
    share = np.tile([0.2, 0.0, 0.8], (20000, 1))
    found = np.bincount(draw_labels(share, np.random.RandomState(0)), minlength=3) / 20000
    np.testing.assert_allclose(found, [0.2, 0.0, 0.8], atol=0.01)


def test_a_gate_starts_from_evenly_spaced_rows(monkeypatch):
    x, y = crossing_lines(0, n=3000)
    order = np.argsort(x[:, 0])  # the first rows alone would know one side only
    x, y, weight = x[order], y[order, None], np.ones(3000)
    scaling = Scaling.of(x, y, weight, True)
    z = with_intercept(scaling.x(x))
    rows = Rows(z, z, scaling.y(y), weight, scaling, 1e-6)
    right = 1 / (1 + np.exp(-3 * x[:, 0]))
    share = np.column_stack([right, 1 - right])
    starts = []
    for most in (50_000, 300):
        monkeypatch.setattr(softmax, "_FIRST_ROWS", most)
        starts.append(SoftmaxGate().start(rows, share, (2,), Effort(steps=25))["coef"][0])
    np.testing.assert_allclose(starts[1], starts[0], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("shape", [1e-3, 0.5, 5.0, 29.9, 30.1, 100.0, 1e4, 1e6])
def test_gamma_densities_keep_their_digits_at_any_shape(shape):
    with mpmath.workdps(40):
        a, mean = mpmath.mpf(shape), mpmath.mpf(2.5)
        peak = a * mpmath.log(a) - a - mpmath.loggamma(a)
        assert float(gamma_peak(np.array(shape)) - peak) == pytest.approx(0, abs=4e-14)
        for x in (2.5, 2.5 * (1 + shape**-0.5), 2.5 * (1 - 0.5 * min(1, shape**-0.5))):
            log_x = mpmath.log(mpmath.mpf(x))
            exact = a * mpmath.log(a / mean) + (a - 1) * log_x - a * mpmath.mpf(x) / mean - mpmath.loggamma(a)
            found = FAMILIES["gamma"].log_prob(np.array([[2.5, shape]]), np.array([x]))[0, 0]
            assert float(found - exact) == pytest.approx(0, abs=1e-12)
