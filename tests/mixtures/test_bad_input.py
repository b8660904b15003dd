"""Bad input is refused in one sentence, or survived without a NaN."""

import numpy as np
import pytest
from oracles.planted_mixtures import crossing_lines
from sklearn.exceptions import ConvergenceWarning

from moestro.mixtures import MixtureOfExpertsClassifier, MixtureOfExpertsRegressor
from moestro.mixtures.experts import REGRESSION_EXPERTS
from moestro.mixtures.gates import GATES

X, Y = crossing_lines(0, n=60)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "soft"}, "gate='soft' is unknown; pass one of"),
        ({"expert": "forest"}, "expert='forest' is unknown; pass one of"),
        ({"expert": 3}, "expert=3 is no expert"),
        ({"algorithm": "sgd"}, "algorithm='sgd' is unknown"),
        ({"init": "zeros"}, "init='zeros' is unknown"),
        ({"init": np.ones((3, 2))}, r"pass shares of shape \(60, 2\)"),
        ({"n_experts": 0}, "has no experts"),
        ({"branching": ()}, "has no experts"),
        ({"branching": (2, 2), "n_experts": 3}, "has 4 leaves"),
        ({"branching": (2, 2), "gate": "gaussian"}, "needs a softmax gate"),
        ({"n_experts": 61}, "n_samples=60 rows are fewer than n_experts=61"),
        ({"max_iter": 0}, "max_iter=0 must be at least 1"),
    ],
)
def test_a_bad_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MixtureOfExpertsRegressor(**options).fit(X, Y)


@pytest.mark.parametrize(
    ("expert", "y", "message"),
    [
        ("poisson", np.append(Y[:-1] * 0, -1), "PoissonExpert explains counts of 0 and more"),
        ("gamma", np.abs(Y) * (np.arange(60) > 0), "gamma experts explain targets above 0"),
        ("linear", np.append(Y[:-1], np.nan), "NaN"),
        ("linear", np.append(Y[:-1], np.inf), "inf"),
    ],
)
def test_a_target_outside_the_support_is_refused(expert, y, message):
    with pytest.raises(ValueError, match=message):
        MixtureOfExpertsRegressor(expert=expert).fit(X, y)


@pytest.mark.parametrize("gate", ["gaussian", "exponential-family", "softmax"])
def test_gates_refuse_inputs_that_are_missing(gate):
    missing = X.copy()
    missing[3] = np.nan
    with pytest.raises(ValueError, match="Input X contains NaN"):
        MixtureOfExpertsRegressor(gate=gate).fit(missing, Y)
    fitted = MixtureOfExpertsRegressor(gate=gate, random_state=0, n_init=1, tol=1e-3).fit(X, Y)
    for ask in (fitted.predict, fitted.gate_proba, lambda x: fitted.log_prob(x, Y), lambda x: fitted.sample(x)):
        with pytest.raises(ValueError, match="Input X contains NaN"):
            ask(missing)


def test_weights_of_zero_are_refused():
    with pytest.raises(ValueError, match="non-zero"):
        MixtureOfExpertsRegressor().fit(X, Y, sample_weight=np.zeros(60))


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="needs samples of at least two classes"):
        MixtureOfExpertsClassifier().fit(X, np.zeros(60))


def test_a_class_that_fit_did_not_see_is_refused():
    fitted = MixtureOfExpertsClassifier(random_state=0, tol=1e-4).fit(X, Y > 0)
    with pytest.raises(ValueError, match="y has the class 2"):
        fitted.log_prob(X, np.full(60, 2))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("gate", list(GATES))
@pytest.mark.parametrize("expert", sorted(set(REGRESSION_EXPERTS) - {"skew-normal", "skew-t", "gp"}))
def test_degenerate_inputs_give_numbers(gate, expert):
    flat = np.hstack([X, X, np.ones((60, 1))])  # a repeated and a constant column
    for x, y in [(flat, np.abs(Y)), (flat, np.ones(60)), (flat * 1e8 + 1e6, np.abs(Y) * 1e-6)]:
        options = {"random_state": 0, "max_iter": 10, "n_init": 1}
        fitted = MixtureOfExpertsRegressor(3, gate=gate, expert=expert, **options).fit(x, y)
        assert np.isfinite(fitted.predict(x)).all()
        assert np.isfinite(fitted.loglik_)


def test_separable_classes_give_probabilities():
    x = np.linspace(-1, 1, 40)[:, None]
    fitted = MixtureOfExpertsClassifier(random_state=0, tol=1e-4).fit(x, x[:, 0] > 0)
    assert np.isfinite(fitted.predict_proba(x)).all()
    assert fitted.score(x, x[:, 0] > 0) == 1.0


def test_an_empty_expert_is_reported():
    x = np.repeat([0.0, 1.0], 20)[:, None]
    share = np.zeros((40, 3))
    share[:20, 0] = share[20:, 1] = 1.0
    with pytest.warns(ConvergenceWarning, match=r"Experts \[2\] explain no rows"):
        fitted = MixtureOfExpertsRegressor(3, expert="constant", init=share, max_iter=20).fit(x, x[:, 0])
    assert np.isfinite(fitted.predict(x)).all()
