"""Experts that are estimators of scikit-learn, extreme learning machines and Gaussian processes."""

import warnings

import numpy as np
import pytest
from oracles.planted_mixtures import bent_line, crossing_lines, xor
from scipy.optimize import approx_fprime
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.linear_model import HuberRegressor, LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsRegressor
from sklearn.svm import SVC, SVR
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor
from sklearn.utils.estimator_checks import check_estimator

from moestro.mixtures import (
    ELMClassifier,
    ELMRegressor,
    GatedEnsembleClassifier,
    MixtureOfExpertsClassifier,
    MixtureOfExpertsRegressor,
    select_n_experts,
)
from moestro.mixtures.experts import EstimatorExpert, GaussianProcessExpert
from moestro.mixtures.experts.process import _evidence


@pytest.mark.parametrize(
    "estimator", [SVR(tol=1e-9), Ridge(), HuberRegressor(), ELMRegressor(random_state=3)], ids=repr
)
def test_one_estimator_expert_is_the_estimator(estimator):
    x, y = bent_line(0, n=100)
    fitted = MixtureOfExpertsRegressor(1, expert=estimator).fit(x, y)
    standard, target = fitted.scaling_.x(x), fitted.scaling_.y(y[:, None])[:, 0]
    alone = estimator.fit(standard, target).predict(standard) * y.std() + y.mean()
    np.testing.assert_allclose(fitted.predict(x), alone, atol=1e-6)  # solvers stop by the order of the rows
    variance = np.mean((y - alone) ** 2)
    np.testing.assert_allclose(fitted.loglik_, -50 * (np.log(2 * np.pi * variance) + 1), rtol=1e-6)


def test_one_classifier_expert_is_the_classifier():
    x, y = xor(0, n=200)
    tree = DecisionTreeClassifier(max_depth=3, random_state=0)
    fitted = MixtureOfExpertsClassifier(1, expert=tree).fit(x, y)
    np.testing.assert_allclose(fitted.predict_proba(x), tree.fit(x, y).predict_proba(x), atol=1e-6)
    assert fitted.n_parameters_ is None


def test_svm_experts_solve_xor_with_lines():
    x, y = xor(0, n=300)
    lines = [
        MixtureOfExpertsClassifier(num, expert=SVC(kernel="linear"), random_state=0).fit(x, y) for num in (1, 2)
    ]
    assert lines[1].score(x, y) > 0.97 > 0.75 > lines[0].score(x, y)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("algorithm", ["em", "ecm", "hard-em"])
@pytest.mark.parametrize("expert", ["gp", "svm", "elm", DecisionTreeRegressor(max_depth=3)], ids=repr)
def test_estimator_experts_never_lower_the_objective(expert, algorithm):
    for seed in range(3):
        x, y = crossing_lines(seed, n=60)
        weight = np.random.default_rng(seed).integers(1, 4, 60)
        options = {"algorithm": algorithm, "init": "random", "n_init": 1, "max_iter": 15, "tol": 0}
        path = (
            MixtureOfExpertsRegressor(2, expert=expert, random_state=seed, **options).fit(x, y, weight).loglik_path_
        )
        assert (np.diff(path) / (1 + np.abs(path[:-1]))).min() > -1e-9


def test_an_expert_of_uncounted_size_is_compared_by_held_out_rows():
    x, y = bent_line(0, n=120)
    model = MixtureOfExpertsRegressor(expert=DecisionTreeRegressor(max_depth=2), random_state=0, n_init=1, tol=1e-3)
    fitted = model.fit(x, y)
    assert "uncounted parameters" in fitted.summary()
    with pytest.raises(ValueError, match="does not say how many numbers it learned"):
        fitted.bic(x, y)
    best, table = select_n_experts(model, x, y, (1, 2), criterion="cv", cv=3)
    assert best.n_parameters_ is None
    assert [row["n_experts"] for row in table] == [1, 2]


@pytest.mark.parametrize(
    ("kind", "expert", "message"),
    [
        (MixtureOfExpertsRegressor, KNeighborsRegressor(), "takes no sample_weight in fit"),
        (MixtureOfExpertsRegressor, RandomForestClassifier(), "explains classes"),
        (MixtureOfExpertsClassifier, Ridge(), "explains numbers"),
        (MixtureOfExpertsClassifier, "linear", "expert='linear' is unknown"),
        (MixtureOfExpertsRegressor, GaussianProcessExpert(max_rows=50), "pass max_rows to allow more than 50"),
    ],
)
def test_an_expert_that_cannot_serve_is_refused(kind, expert, message):
    x, y = xor(0, n=60)
    with pytest.raises(ValueError, match=message):
        kind(expert=expert).fit(x, y)


def test_a_class_that_a_region_never_saw_keeps_a_little_probability():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, 150)
    x = rng.standard_normal((150, 2)) + np.array([[0, 0], [8, 0], [0, 8]])[label]
    share = np.eye(2)[(label > 0).astype(int)]
    model = MixtureOfExpertsClassifier(2, expert=LogisticRegression(), init=share, max_iter=5)
    fitted = model.fit(x, label)
    assert fitted.score(x, label) > 0.95
    assert np.isfinite(fitted.log_prob(x, label)).all()


def test_a_gaussian_process_expert_is_the_process():
    x, y = bent_line(0, n=80)
    kernel = ConstantKernel(2.0) * RBF(0.7)
    expert = GaussianProcessExpert(kernel, noise=0.05, optimize=False)
    fitted = MixtureOfExpertsRegressor(1, expert=expert).fit(x, y)
    standard, target = fitted.scaling_.x(x), fitted.scaling_.y(y[:, None])[:, 0]
    exact = GaussianProcessRegressor(kernel, alpha=0.05, optimizer=None).fit(standard, target)
    grid = np.linspace(-1, 2, 30)[:, None]
    mean, std = exact.predict(fitted.scaling_.x(grid), return_std=True)
    found = fitted.predict(grid, return_std=True)
    np.testing.assert_allclose(found[0], y.mean() + y.std() * mean, atol=1e-6)
    np.testing.assert_allclose(found[1], y.std() * np.sqrt(std**2 + 0.05), atol=1e-6)
    # the bound of one expert is tight: it is the evidence
    evidence = exact.log_marginal_likelihood_value_ - 80 * np.log(y.std())
    np.testing.assert_allclose(fitted.loglik_path_[-1], evidence, rtol=1e-9)


def test_a_gaussian_process_expert_learns_what_scikit_learn_learns():
    x, y = bent_line(0, n=80)
    fitted = MixtureOfExpertsRegressor(1, expert=GaussianProcessExpert(ConstantKernel() * RBF()), tol=1e-9).fit(
        x, y
    )
    standard, target = fitted.scaling_.x(x), fitted.scaling_.y(y[:, None])[:, 0]
    exact = GaussianProcessRegressor(ConstantKernel() * RBF() + WhiteKernel(0.1)).fit(standard, target)
    evidence = exact.log_marginal_likelihood_value_ - 80 * np.log(y.std())
    np.testing.assert_allclose(fitted.loglik_path_[-1], evidence, atol=1e-2)


def test_the_evidence_of_softly_assigned_rows_and_its_gradient():
    rng = np.random.default_rng(0)
    x, y, mass = rng.standard_normal((20, 2)), rng.standard_normal(20), rng.integers(0, 3, 20).astype(float)
    kernel = ConstantKernel(1.5) * RBF([0.7, 1.2])
    theta = np.append(kernel.theta, np.log(0.3))
    twice = np.repeat(np.arange(20), mass.astype(int))  # a row of mass two is the row twice
    exact = GaussianProcessRegressor(kernel, alpha=0.3, optimizer=None).fit(x[twice], y[twice])
    used = mass > 0
    value, slope = _evidence(theta, kernel, (x[used], y[used], mass[used]))
    np.testing.assert_allclose(-value, exact.log_marginal_likelihood_value_, rtol=1e-9)
    numeric = approx_fprime(theta, lambda t: _evidence(t, kernel, (x, y, mass))[0], 1e-6)
    np.testing.assert_allclose(slope, numeric, rtol=1e-4, atol=1e-5)


def test_gaussian_process_experts_share_a_line_with_a_jump_and_another_noise():
    rng = np.random.default_rng(0)
    x = np.sort(rng.uniform(-2, 2, 120))
    y = np.where(x < 0, np.sin(4 * x), 3 + 0 * x) + np.where(x < 0, 0.05, 0.5) * rng.standard_normal(120)
    options = {"random_state": 0, "n_init": 2, "tol": 1e-4}
    fits = [MixtureOfExpertsRegressor(num, expert="gp", **options).fit(x[:, None], y) for num in (1, 2)]
    assert fits[1].loglik_ > fits[0].loglik_ + 20
    std = fits[1].predict(np.array([[-1.0], [1.0]]), return_std=True)[1]
    assert std[0] < 0.15 < 0.35 < std[1]


def test_elm_experts_with_a_unit_per_row_interpolate():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((30, 8)), rng.standard_normal(30)
    many = ELMRegressor(60, alpha=0.0, random_state=0).fit(x, y)
    np.testing.assert_allclose(many.predict(x), y, atol=1e-8)


def test_elm_experts_one_is_ridge_regression_on_its_features():
    x, y = bent_line(0, n=100)
    both = np.column_stack([y, x[:, 0] ** 2])
    fitted = ELMRegressor(20, alpha=0.5, random_state=0).fit(x, both)
    theirs = Ridge(alpha=0.5).fit(fitted.hidden_features(x), both)
    np.testing.assert_allclose(fitted.predict(x), theirs.predict(fitted.hidden_features(x)), atol=1e-10)
    again = ELMRegressor(20, alpha=0.5, random_state=0).fit(x, both)
    np.testing.assert_array_equal(again.predict(x), fitted.predict(x))


def test_elm_experts_five_are_steadier_than_one():
    x, y = xor(0, n=400)
    test_x, test_y = xor(1, n=1000)
    alone, mixed = [], []
    for seed in range(20):
        alone.append(ELMClassifier(6, random_state=seed).fit(x, y).score(test_x, test_y))
        model = GatedEnsembleClassifier(ELMClassifier(6), 5, training="em", max_rounds=3, random_state=seed)
        mixed.append(model.fit(x, y).score(test_x, test_y))
    assert np.std(mixed) < np.std(alone)
    assert np.mean(mixed) > np.mean(alone)


@pytest.mark.parametrize("options", [{"hidden": 0}, {"alpha": -1.0}])
def test_elm_experts_refuse_bad_options(options):
    with pytest.raises(ValueError, match="must be at least"):
        ELMRegressor(**options).fit(*bent_line(0, n=20))


@pytest.mark.parametrize("estimator", [ELMRegressor(), ELMClassifier()], ids=repr)
def test_elm_experts_scikit_learn_finds_no_fault(estimator):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(estimator, on_fail=None)
    assert [(r["check_name"], r["exception"]) for r in results if r["status"] == "failed"] == []


def test_copies_of_an_estimator_differ_by_their_seed():
    x, y = bent_line(0, n=60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = MixtureOfExpertsRegressor(2, expert=EstimatorExpert(ELMRegressor(5)), max_iter=2).fit(x, y)
    first, second = fitted.expert_estimators_
    assert (first.random_state, second.random_state) == (0, 1)
