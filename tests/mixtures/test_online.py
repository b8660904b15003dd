"""The mixture that learns row by row."""

import warnings

import numpy as np
import pytest
from oracles.planted_mixtures import crossing_lines, xor
from sklearn.linear_model import LogisticRegression
from sklearn.utils.estimator_checks import check_estimator

from moestro.mixtures import (
    MixtureOfExpertsClassifier,
    MixtureOfExpertsRegressor,
    OnlineMixtureOfExpertsClassifier,
    OnlineMixtureOfExpertsRegressor,
)


def test_hme_online_one_pass_comes_within_a_percent_of_em():
    for seed in range(2):
        x, y = crossing_lines(seed, n=6000)
        batch = MixtureOfExpertsRegressor(2, random_state=0, n_init=2).fit(x, y)
        online = OnlineMixtureOfExpertsRegressor(2, n_passes=1, random_state=0).fit(x, y)
        assert online.log_likelihood(x, y) > 1.01 * batch.loglik_
        assert online.n_seen_ == 6000


def test_hme_online_one_expert_is_ridge_regression():
    x, y = crossing_lines(0, n=300)
    model = OnlineMixtureOfExpertsRegressor(1, forgetting=1.0, prior=4.0, random_state=0).partial_fit(x, y)
    z = np.column_stack([np.ones(300), model.scaling_.x(x)])
    start = (
        0.5 * np.random.RandomState(0).standard_normal((1, 2, 1))[0, :, 0]
    )  # a ridge towards the first coefficients
    inner = z.T @ z + np.eye(2) / 4.0
    expected = np.linalg.solve(inner, z.T @ model.scaling_.y(y[:, None])[:, 0] + start / 4.0)
    np.testing.assert_allclose(model.mixture_.expert_params["coef"][0, :, 0], expected, atol=1e-8)


def test_calls_of_partial_fit_are_one_pass():
    x, y = crossing_lines(0, n=200)
    whole = OnlineMixtureOfExpertsRegressor(branching=(2, 2), random_state=0).partial_fit(x, y)
    parts = OnlineMixtureOfExpertsRegressor(branching=(2, 2), random_state=0).partial_fit(x[:120], y[:120])
    unit = parts.scaling_
    parts.partial_fit(x[120:], y[120:])
    assert parts.scaling_ is unit  # the first rows set the units
    assert parts.n_seen_ == whole.n_seen_ == 200
    np.testing.assert_allclose(parts.gate_proba(x).sum(1), 1.0)
    np.testing.assert_allclose(parts.predict(x), whole.predict(x), atol=1.5)


def test_several_outputs():
    x, y = crossing_lines(0, n=500)
    model = OnlineMixtureOfExpertsRegressor(2, random_state=0).fit(x, np.column_stack([y, -y]))
    np.testing.assert_allclose(model.predict(x)[:, 0], -model.predict(x)[:, 1], atol=0.2)


@pytest.mark.parametrize("options", [{"n_passes": 0}, {"forgetting": 0.0}, {"forgetting": 1.1}, {"prior": 0.0}])
def test_a_bad_option_is_refused(options):
    with pytest.raises(ValueError, match=r"must be at least 1, forgetting=.* in \(0, 1\]"):
        OnlineMixtureOfExpertsRegressor(**options).fit(*crossing_lines(0, n=20))
    with pytest.raises(ValueError, match=r"must be at least 1, forgetting=.* in \(0, 1\]"):
        OnlineMixtureOfExpertsClassifier(**options).partial_fit(*xor(0, n=20))


def test_hme_online_one_logit_expert_takes_the_newton_steps_written_out():
    x, y = xor(0, n=40)
    model = OnlineMixtureOfExpertsClassifier(1, forgetting=0.9, prior=4.0, random_state=0).partial_fit(x, y)
    beta = 0.5 * np.random.RandomState(0).standard_normal(3)
    inverse = np.eye(3) / 4.0  # of R
    for t, (row, label) in enumerate(zip(model.scaling_.x(x), y, strict=True)):
        z, keep = np.append(1.0, row), 1 - 0.1 * 0.999**t
        p = 1 / (1 + np.exp(-beta @ z))  # of the first class
        inverse = keep * inverse + max(p * (1 - p), 1e-3) * np.outer(z, z)
        beta = beta + np.linalg.solve(inverse, z) * ((label == 0) - p)
    np.testing.assert_allclose(model.mixture_.expert_params["coef"].ravel(), beta, rtol=1e-9)


def test_hme_online_one_logit_expert_comes_near_logistic_regression():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5000, 2))
    y = rng.random(5000) < 1 / (1 + np.exp(-(0.5 + x @ [1.0, -2.0])))
    model = OnlineMixtureOfExpertsClassifier(1, n_passes=1, forgetting=1.0, random_state=0).fit(x, y)
    whole = LogisticRegression(C=np.inf).fit(x, y)
    np.testing.assert_allclose(-model.expert_coef_[0, 0], whole.coef_[0], atol=0.05)


def test_hme_online_classes_reach_what_em_reaches():
    x, y = xor(0, n=3000)
    batch = MixtureOfExpertsClassifier(2, random_state=0, tol=1e-4).fit(x, y)
    online = OnlineMixtureOfExpertsClassifier(2, random_state=1).fit(x, y)
    assert online.score(x, y) > 0.95 * batch.score(x, y)


def test_hme_online_classes_may_come_late():
    x, y = xor(0, n=300)
    names = np.array(["a", "b", "c"])[y + (x[:, 0] > 0.5)]
    model = OnlineMixtureOfExpertsClassifier(branching=(2, 2), random_state=0)
    model.partial_fit(x[y == 0][:50], names[y == 0][:50], classes=["c", "b", "a"]).partial_fit(x, names)
    assert model.classes_.tolist() == ["a", "b", "c"]
    assert model.n_seen_ == 350
    np.testing.assert_allclose(model.predict_proba(x).sum(1), 1.0)
    with pytest.raises(ValueError, match="but the first call had"):
        model.partial_fit(x, names, classes=["a", "b"])
    with pytest.raises(ValueError, match="y has the class d"):
        model.partial_fit(x[:2], ["a", "d"])


def test_hme_online_weights_of_one_linear_expert_are_repetitions():
    x, y = crossing_lines(0, n=100)
    weight = np.random.default_rng(0).integers(0, 4, 100)
    options = {"n_experts": 1, "forgetting": 1.0, "random_state": 0}
    first = OnlineMixtureOfExpertsRegressor(**options).partial_fit(x[:1], y[:1])  # the same units for both
    second = OnlineMixtureOfExpertsRegressor(**options).partial_fit(x[:1], y[:1])
    first.partial_fit(x, y, sample_weight=weight)
    second.partial_fit(x.repeat(weight, 0), y.repeat(weight))
    for model in (first, second):
        assert model.mixture_.expert_params["coef"].shape == (1, 2, 1)
    np.testing.assert_allclose(first.expert_coef_, second.expert_coef_, rtol=1e-6)
    assert first.n_seen_ == 1 + (weight > 0).sum()


@pytest.mark.parametrize("estimator", [OnlineMixtureOfExpertsRegressor, OnlineMixtureOfExpertsClassifier])
def test_order_and_repetition_do_not_matter_to_a_fit(estimator):
    x, y = xor(0, n=200)
    rng = np.random.default_rng(0)
    weight = rng.integers(0, 3, 200)
    order = rng.permutation(weight.sum())
    one = estimator(random_state=0).fit(x, y, sample_weight=weight)
    two = estimator(random_state=0).fit(x.repeat(weight, 0)[order], y.repeat(weight)[order])
    np.testing.assert_array_equal(one.gate_proba(x), two.gate_proba(x))


def test_heavy_rows_pull_a_mixture_their_way():
    x, y = crossing_lines(0, n=500)
    line = np.random.default_rng(0).random(500) < 0.5
    target = np.where(line, y, 3 * x[:, 0])
    heavy = OnlineMixtureOfExpertsRegressor(1, random_state=0).fit(x, target, np.where(line, 0.01, 100))
    np.testing.assert_allclose(heavy.predict(x), 3 * x[:, 0], atol=0.1)
    alike = [OnlineMixtureOfExpertsRegressor(random_state=0).fit(x, y, np.full(500, w)) for w in (1.0, 1e4)]
    np.testing.assert_array_equal(alike[0].predict(x), alike[1].predict(x))


def test_rows_without_weight_are_refused():
    x, y = xor(0, n=20)
    with pytest.raises(ValueError, match="at least one non-zero"):
        OnlineMixtureOfExpertsRegressor().fit(x, y, np.zeros(20))
    with pytest.raises(ValueError, match="at least one non-zero"):
        OnlineMixtureOfExpertsClassifier().partial_fit(x, y, sample_weight=np.zeros(20))


@pytest.mark.parametrize("estimator", [OnlineMixtureOfExpertsRegressor, OnlineMixtureOfExpertsClassifier])
def test_scikit_learn_finds_no_fault(estimator):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(estimator(), on_fail=None)
    assert [(r["check_name"], r["exception"]) for r in results if r["status"] == "failed"] == []
