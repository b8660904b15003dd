"""Gated ensembles and the three losses of 1991."""

import warnings

import numpy as np
import pytest
from oracles.planted_mixtures import bent_line, xor
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import check_estimator

from moestro.mixtures import GatedEnsembleClassifier, GatedEnsembleRegressor
from moestro.mixtures.ensemble import _train_gate
from moestro.mixtures.losses import LOSSES, blend, expected, mixture
from moestro.mixtures.rows import with_intercept

CASE = np.zeros((1, 2)), np.array([[[0.0], [2.0]]]), np.array([[1.5]])


@pytest.mark.parametrize(
    ("loss", "value", "by_output", "by_logit"),
    [
        (blend, 0.25, [-0.5, -0.5], [0.5, -0.5]),
        (expected, 1.25, [-1.5, 0.5], [0.5, -0.5]),
        (mixture, 0.504885, [-0.403412, 0.365529], [0.231059, -0.231059]),
    ],
)
def test_jacobs_1991_and_meta_pi_b_numeric_case(loss, value, by_output, by_logit):
    found = loss(*CASE)
    np.testing.assert_allclose(found.value, [value], atol=1e-6)
    np.testing.assert_allclose(found.by_output[0, :, 0], by_output, atol=1e-6)
    np.testing.assert_allclose(found.by_logit[0], by_logit, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES.values())
def test_jacobs_1991_derivatives_are_those_of_finite_differences(loss):
    rng = np.random.default_rng(0)
    logits, outputs, target = (
        rng.standard_normal((3, 4)),
        rng.standard_normal((3, 4, 2)),
        rng.standard_normal((3, 2)),
    )
    found = loss(logits, outputs, target)
    for index in np.ndindex(3, 4):
        step = np.zeros((3, 4))
        step[index] = 1e-6
        rise = loss(logits + step, outputs, target).value - loss(logits - step, outputs, target).value
        np.testing.assert_allclose(rise.sum() / 2e-6, found.by_logit[index], atol=1e-7)
        step = np.zeros((3, 4, 2))
        step[(*index, 1)] = 1e-6
        rise = loss(logits, outputs + step, target).value - loss(logits, outputs - step, target).value
        np.testing.assert_allclose(rise.sum() / 2e-6, found.by_output[(*index, 1)], atol=1e-7)


def test_jacobs_1991_jensen_and_one_expert():
    rng = np.random.default_rng(0)
    logits, outputs, target = (
        rng.standard_normal((50, 3)),
        rng.standard_normal((50, 3, 2)),
        rng.standard_normal((50, 2)),
    )
    assert (mixture(logits, outputs, target).value <= 0.5 * expected(logits, outputs, target).value + 1e-12).all()
    one = logits[:, :1], outputs[:, :1], target
    np.testing.assert_allclose(blend(*one).value, expected(*one).value)
    np.testing.assert_allclose(blend(*one).value, 2 * mixture(*one).value)


def test_jacobs_1991_the_best_expert_learns_slowest_under_e2_and_fastest_under_e3():
    outputs, target = np.array([[[1.2], [2.0], [4.0]]]), np.zeros((1, 1))
    slow = np.abs(expected(np.zeros((1, 3)), outputs, target).by_output[0, :, 0])
    fast = np.abs(mixture(np.zeros((1, 3)), outputs, target).by_output[0, :, 0])
    assert (np.diff(slow) > 0).all()
    assert (np.diff(fast) < 0).all()


def test_meta_pi_a_one_expert_is_the_expert():
    x, y = xor(0, n=200)
    one = GatedEnsembleClassifier(n_experts=1).fit(x, y)
    np.testing.assert_allclose(one.predict_proba(x), LogisticRegression().fit(x, y).predict_proba(x), atol=1e-12)


def speakers(rng, rows):
    """Three classes seen by six sources that turn and shift them, with a voice cue (after Meta-Pi)."""
    turn = np.radians([120, -120, -40, 40, 0, 0])
    shift = np.array([(4, 4), (-4, 4), (-1.4, -5), (1.4, -5), (0, -2.5), (0, -4.2)])
    voice = np.array([(2, 0, 1), (-2, 0, 1), (0, 1.5, -1), (1.3, -0.75, -1), (-1.3, -0.75, -1), (0, 0, -1)])
    prototype = np.array([(2, 0), (-1, 3**0.5), (-1, -(3**0.5))])
    source = np.repeat(np.arange(6), rows)
    y = rng.integers(0, 3, 6 * rows)
    c, s = np.cos(turn[source]), np.sin(turn[source])
    p = prototype[y]
    sound = np.column_stack([c * p[:, 0] - s * p[:, 1], s * p[:, 0] + c * p[:, 1]]) + shift[source]
    sound += 0.75 * rng.standard_normal(sound.shape)
    return np.hstack([sound, voice[source] + 0.25 * rng.standard_normal((6 * rows, 3))]), y, source


class SoundOnly(LogisticRegression):
    """An expert that hears the two acoustic inputs only."""

    def fit(self, X, y, sample_weight=None):
        return super().fit(X[:, :2], y, sample_weight)

    def predict_proba(self, X):
        return super().predict_proba(X[:, :2])


def test_meta_pi_c_the_gate_finds_the_speakers_and_spans_one_without_an_expert():
    for seed in range(2):
        rng = np.random.default_rng(seed)
        x, y, source = speakers(rng, 300)
        heard = y.copy()
        useless = source == 5
        heard[useless] = rng.integers(0, 3, useless.sum())
        experts = [SoundOnly().fit(x[source == k], heard[source == k]) for k in range(6)]
        fitted = GatedEnsembleClassifier(SoundOnly()).fit(x, y, groups=source)
        fitted.estimators_ = experts  # the last speaker's expert has learned from random labels
        u = with_intercept((x - fitted._center) / fitted._scale)
        fitted._coef = _train_gate(u, fitted._outputs(x), np.eye(3)[y], np.ones(len(y)), "blend", 1e-4)[0]
        x, y, source = speakers(rng, 1000)
        weight = np.stack([fitted.gate_proba(x)[source == k].mean(0) for k in range(6)])
        assert (np.diag(weight)[:5] >= 0.6).all()
        assert weight[5, 5] < 0.05
        assert weight[5, 2:5].sum() > 0.95
        right = fitted.predict(x) == y
        assert right[source == 5].mean() >= 0.9
        assert (
            max((experts[k].predict_proba(x[source == 5]).argmax(1) == y[source == 5]).mean() for k in (2, 3, 4))
            < 0.85
        )
        assert right.mean() >= 0.96


def test_svm_mixture_of_two_linear_machines_solves_xor():
    x, y = xor(0, n=800)
    single = LinearSVC().fit(x, y).score(x, y)
    found = [
        GatedEnsembleClassifier(LinearSVC(), 2, max_rounds=30, capacity_slack=40, random_state=seed)
        .fit(x, y)
        .score(x, y)
        for seed in range(5)
    ]
    assert single < 0.75
    assert max(found) > 0.95


def test_svm_mixture_parts_keep_their_capacity_and_threads_change_nothing():
    x, y = xor(0, n=203)
    fits = [GatedEnsembleClassifier(n_experts=4, random_state=0, n_jobs=jobs).fit(x, y) for jobs in (None, 2)]
    held = fits[0].part_sizes_
    np.testing.assert_allclose(held.sum(), 203)
    assert held.max() <= 203 / 4 + 1 + 1e-9
    np.testing.assert_array_equal(fits[0].predict_proba(x), fits[1].predict_proba(x))


def test_weighted_refits_find_the_bend():
    x, y = bent_line(0)
    fitted = GatedEnsembleRegressor(
        LinearRegression(), 2, training="em", loss="mixture", max_rounds=50, random_state=3
    )
    with_groups = GatedEnsembleRegressor(LinearRegression()).fit(x, y, groups=x[:, 0] > 0.5)
    assert with_groups.score(x, y) > 0.8
    assert fitted.fit(x, y).round_losses_[-2] <= fitted.round_losses_[0]
    with pytest.raises(ValueError, match="needs an estimator with sample_weight"):
        GatedEnsembleRegressor(GaussianProcessRegressor(), training="em").fit(x, y)


def test_product_of_experts_adds_logits():
    x, y = xor(0, n=300)
    blend_, product = (
        GatedEnsembleClassifier(n_experts=2, combine=how, max_rounds=1, random_state=0).fit(x, y)
        for how in ("blend", "product")
    )
    share, outputs = product.gate_proba(x), product.predict_experts(x)
    logits = (share * np.log(outputs[:, :, 1] / outputs[:, :, 0])).sum(1)
    np.testing.assert_allclose(product.predict_proba(x)[:, 1], 1 / (1 + np.exp(-logits)), atol=1e-12)
    np.testing.assert_allclose(blend_.predict_proba(x), (share[:, :, None] * outputs).sum(1), atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"training": "sgd"}, "training='sgd' is unknown"),
        ({"loss": "hinge"}, "loss='hinge' is unknown"),
        ({"combine": "vote"}, "combine='vote' is unknown"),
        ({"n_experts": 0}, "n_experts=0"),
    ],
)
def test_a_bad_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GatedEnsembleClassifier(**options).fit(*xor(0, n=20))


@pytest.mark.parametrize("estimator", [GatedEnsembleRegressor(), GatedEnsembleClassifier()], ids=repr)
def test_scikit_learn_finds_no_fault(estimator):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(estimator, on_fail=None)
    assert [(r["check_name"], r["exception"]) for r in results if r["status"] == "failed"] == []
