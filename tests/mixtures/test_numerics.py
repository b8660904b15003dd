"""Linear algebra over many rows, against loops and the whole."""

import numpy as np
import pytest
from oracles.planted_mixtures import crossing_lines

from moestro.mixtures.gates import softmax
from moestro.mixtures.gates.base import Effort
from moestro.mixtures.gates.softmax import SoftmaxGate
from moestro.mixtures.numerics import draw_labels, weighted_gram
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
