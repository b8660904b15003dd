"""The estimators are scikit-learn citizens."""

import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
from joblib import parallel_config
from oracles.planted_mixtures import bent_line, crossing_lines, xor
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import get_tags
from sklearn.utils.estimator_checks import check_estimator, estimator_checks_generator

from moestro.mixtures import MixtureOfExpertsClassifier, MixtureOfExpertsRegressor
from moestro.mixtures.experts import CLASSIFICATION_EXPERTS, REGRESSION_EXPERTS, GaussianExpert
from moestro.mixtures.gates import GATES, SoftmaxGate

ALL = [(MixtureOfExpertsRegressor, gate, expert) for gate in GATES for expert in REGRESSION_EXPERTS]
ALL += [(MixtureOfExpertsClassifier, gate, expert) for gate in GATES for expert in CLASSIFICATION_EXPERTS]


def failures(estimator):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # checks fit nonsense on purpose; what they assert is their own
        results = check_estimator(estimator, on_fail=None)
    assert sum(result["status"] == "passed" for result in results) > 50
    return [(result["check_name"], result["exception"]) for result in results if result["status"] == "failed"]


@pytest.mark.parametrize(
    "estimator",
    [
        MixtureOfExpertsRegressor(n_init=1),
        MixtureOfExpertsRegressor(gate="gaussian", expert="gaussian"),
        MixtureOfExpertsClassifier(n_init=1, max_iter=20),
    ],
    ids=repr,
)
def test_scikit_learn_finds_no_fault(estimator):
    assert failures(estimator) == []


@pytest.mark.nightly
@pytest.mark.timeout(1800)  # skew experts converge slowly on the nonsense that checks fit
@pytest.mark.parametrize(("kind", "gate", "expert"), ALL)
def test_scikit_learn_finds_no_fault_in_any_gate_and_expert(kind, gate, expert):
    assert failures(kind(gate=gate, expert=expert)) == []


@pytest.mark.nightly
@pytest.mark.parametrize("algorithm", ["gem", "ecm", "mm", "hard-em", "stochastic-em", "annealed-em"])
@pytest.mark.parametrize("kind", [MixtureOfExpertsRegressor, MixtureOfExpertsClassifier])
def test_scikit_learn_finds_no_fault_in_any_algorithm(kind, algorithm):
    assert failures(kind(algorithm=algorithm)) == []


@pytest.mark.parametrize(("kind", "gate", "expert"), ALL)
def test_weights_are_repetitions_for_every_gate_and_expert(kind, gate, expert):
    estimator = kind(gate=gate, expert=expert, n_init=2, max_iter=20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for one, check in estimator_checks_generator(estimator):
            if "equivalence_on_dense" in check.func.__name__:
                check(one)


def test_importing_needs_no_torch():
    code = "import sys, moestro.mixtures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_parts_can_be_searched_in_a_pipeline():
    x, y = bent_line(0, n=200)
    pipe = make_pipeline(
        StandardScaler(),
        MixtureOfExpertsRegressor(expert=GaussianExpert(), n_init=2, tol=1e-4, random_state=0),
    )
    grid = {
        "mixtureofexpertsregressor__n_experts": [1, 2],
        "mixtureofexpertsregressor__expert__alpha": [0.0, 1.0],
    }
    search = GridSearchCV(pipe, grid, cv=2).fit(x, y)
    assert search.best_params_["mixtureofexpertsregressor__n_experts"] == 2


def test_copies_predict_the_same():
    x, y = xor(0, n=200)
    fitted = MixtureOfExpertsClassifier(gate=SoftmaxGate(alpha=1e-3), random_state=0, tol=1e-4).fit(x, y)
    again = clone(fitted).fit(x, y)
    thawed = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.predict_proba(x), fitted.predict_proba(x))
    np.testing.assert_array_equal(thawed.predict_proba(x), fitted.predict_proba(x))


def test_gate_probabilities_are_named_features():
    x, y = crossing_lines(0, n=100)
    fitted = MixtureOfExpertsRegressor(n_experts=3, random_state=0, tol=1e-4).fit(x, y)
    names = ["mixtureofexpertsregressor0", "mixtureofexpertsregressor1", "mixtureofexpertsregressor2"]
    assert fitted.get_feature_names_out().tolist() == names
    np.testing.assert_allclose(fitted.transform(x).sum(1), 1.0)


def test_pandas_output():
    pytest.importorskip("pandas")
    x, y = crossing_lines(0, n=100)
    fitted = MixtureOfExpertsRegressor(random_state=0, tol=1e-4).set_output(transform="pandas").fit(x, y)
    assert list(fitted.transform(x).columns) == list(fitted.get_feature_names_out())


def test_processes_do_not_change_the_fit():
    x, y = crossing_lines(0, n=100)
    with parallel_config("threading"):
        fits = [MixtureOfExpertsRegressor(random_state=0, tol=1e-4, n_jobs=jobs).fit(x, y) for jobs in (None, 2)]
    np.testing.assert_array_equal(fits[0].predict(x), fits[1].predict(x))


def test_order_and_repetition_of_rows_do_not_matter():
    x, y = crossing_lines(0, n=100)
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(100), 2))
    once = MixtureOfExpertsRegressor(random_state=0, tol=1e-4).fit(x, y, sample_weight=np.full(100, 2.0))
    twice = MixtureOfExpertsRegressor(random_state=0, tol=1e-4).fit(x[order], y[order])
    np.testing.assert_array_equal(once.predict(x), twice.predict(x))
    assert once.loglik_ == twice.loglik_


def test_warm_start_goes_on():
    x, y = crossing_lines(0, n=300)
    model = MixtureOfExpertsRegressor(warm_start=True, max_iter=3, n_init=1, tol=0)
    with pytest.warns(ConvergenceWarning):
        first = model.fit(x, y).loglik_
    with pytest.warns(ConvergenceWarning):
        assert model.fit(x, y).loglik_ > first
    model.set_params(n_experts=3)
    with pytest.raises(ValueError, match="warm_start=True needs"):
        model.fit(x, y)


def test_progress_is_printed(capsys):
    x, y = crossing_lines(0, n=50)
    MixtureOfExpertsRegressor(verbose=1, n_init=1, tol=1e-3).fit(x, y)
    assert "start 1/1, iteration 0: mean objective" in capsys.readouterr().out


def test_experts_of_positive_targets_are_no_transformers():
    assert not hasattr(MixtureOfExpertsRegressor(expert="gamma"), "transform")
    assert not hasattr(MixtureOfExpertsRegressor(expert="gamma"), "fit_transform")
    assert hasattr(MixtureOfExpertsRegressor(), "fit_transform")


@pytest.mark.parametrize("kind", [MixtureOfExpertsRegressor, MixtureOfExpertsClassifier])
def test_tags_are_told_without_asking_for_tags(kind, monkeypatch):
    asked, plain = [], kind._chosen_expert
    monkeypatch.setattr(kind, "_chosen_expert", lambda self: asked.append(1) or plain(self))
    assert get_tags(kind()).transformer_tags is not None
    assert len(asked) == 1  # an answer that asks for tags again fills the stack
