"""Every estimator of the package can be copied, pickled, put into a pipeline and searched."""

import pickle
import warnings

import numpy as np
import pytest
from oracles.planted_mixtures import crossing_lines
from sklearn.base import clone, is_classifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeRegressor

import moestro.mixtures as mixtures
from moestro.mixtures.experts import NoisyExpert
from moestro.mixtures.gates import ExponentialFamilyGate

QUICK = {"n_init": 1, "max_iter": 5, "random_state": 0}
SHORT = {"n_burn": 2, "n_samples": 2, "n_chains": 1, "random_state": 0}
EVERY = [
    (mixtures.MixtureOfExpertsRegressor(**QUICK), {"n_experts": [1, 2]}),
    (mixtures.MixtureOfExpertsRegressor(expert="gp", gate="kernel", **QUICK), {"n_experts": [1, 2]}),
    (mixtures.MixtureOfExpertsRegressor(expert="svm", gate="reconstruction", **QUICK), {"n_experts": [1, 2]}),
    (mixtures.MixtureOfExpertsRegressor(expert="elm", gate="gaussian", **QUICK), {"n_experts": [1, 2]}),
    (mixtures.MixtureOfExpertsRegressor(expert="bayesian", **QUICK), {"gate": ["softmax", "constant"]}),
    (mixtures.MixtureOfExpertsRegressor(3, expert=NoisyExpert(), **QUICK), {"n_experts": [2, 3]}),
    (mixtures.MixtureOfExpertsRegressor(gate=ExponentialFamilyGate("gaussian"), **QUICK), {"n_experts": [1, 2]}),
    (
        mixtures.MixtureOfExpertsRegressor(expert=DecisionTreeRegressor(max_depth=3), **QUICK),
        {"expert__max_depth": [2, 3]},
    ),
    (mixtures.MixtureOfExpertsClassifier(**QUICK), {"expert": ["multinomial", "elm"]}),
    (mixtures.OnlineMixtureOfExpertsRegressor(n_passes=1, random_state=0), {"n_experts": [1, 2]}),
    (mixtures.OnlineMixtureOfExpertsClassifier(n_passes=1, random_state=0), {"n_experts": [1, 2]}),
    (mixtures.GatedEnsembleRegressor(max_rounds=1, random_state=0), {"n_experts": [1, 2]}),
    (mixtures.GatedEnsembleClassifier(max_rounds=1, random_state=0), {"n_experts": [1, 2]}),
    (mixtures.DistributedGPRegressor(points_per_expert=20, random_state=0), {"aggregation": ["poe", "rbcm"]}),
    (mixtures.ELMRegressor(random_state=0), {"hidden": [5, 50]}),
    (mixtures.ELMClassifier(random_state=0), {"hidden": [5, 50]}),
    (mixtures.ForecastAggregator(), {"weighting": ["precision", "covariance"]}),
    (mixtures.DirichletProcessMixtureOfExpertsRegressor(**SHORT), {"n_auxiliary": [1, 3]}),
    (mixtures.DirichletProcessMixtureOfExpertsClassifier(**SHORT), {"n_auxiliary": [1, 3]}),
]


@pytest.mark.parametrize(("estimator", "grid"), EVERY, ids=lambda value: repr(value)[:60].replace("\n", " "))
def test_every_estimator_is_copied_pickled_and_searched_in_a_pipeline(estimator, grid):
    x, y = crossing_lines(0, n=60)
    x = np.column_stack([x, x[:, 0] ** 2])
    if is_classifier(estimator):
        y = np.where(y > 0, "up", "down")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = clone(estimator).fit(x, y)
        again = clone(fitted).fit(x, y)
        pipe = make_pipeline(StandardScaler(), clone(estimator))
        step = pipe.steps[-1][0]
        search = GridSearchCV(pipe, {f"{step}__{name}": values for name, values in grid.items()}, cv=2).fit(x, y)
    expected = fitted.predict(x)
    np.testing.assert_array_equal(again.predict(x), expected)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(fitted)).predict(x), expected)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()


def test_sources_found_are_named_columns():
    pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 3)) @ ((rng.random((3, 30)) < 0.2) * rng.standard_normal((3, 30)))
    model = mixtures.SparseGaussianICA(3).set_output(transform="pandas").fit(x)
    assert list(model.transform(x).columns) == list(model.get_feature_names_out())
    np.testing.assert_allclose(pickle.loads(pickle.dumps(model)).transform(x), model.transform(x))


def test_every_public_estimator_is_covered():
    tested = {type(estimator).__name__ for estimator, _ in EVERY} | {"SparseGaussianICA"}
    assert tested == {name for name in mixtures.__all__ if isinstance(getattr(mixtures, name), type)}
