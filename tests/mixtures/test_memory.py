"""Experts that are dear to fit are asked and trained no oftener than they must be."""

import pickle

import numpy as np
import pytest
from oracles.planted_mixtures import bent_line, crossing_lines
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.linear_model import LinearRegression

from moestro.mixtures import MixtureOfExpertsRegressor
from moestro.mixtures.experts.memory import Answers, Learned

ASKED = []


class Counting(RegressorMixin, BaseEstimator):
    """A linear regression that notes what it is asked."""

    def fit(self, X, y, sample_weight=None):
        ASKED.append("fit")
        self.line_ = LinearRegression().fit(X, y, sample_weight)
        return self

    def predict(self, X):
        ASKED.append("predict")
        return self.line_.predict(X)


def test_an_answer_is_kept_for_the_same_rows_only():
    asked = []
    answers = Answers(lambda z: asked.append(len(z)) or 2 * z)
    z = np.arange(3.0)
    assert answers(z) is answers(z)
    np.testing.assert_array_equal(answers(z.copy()), 2 * z)
    np.testing.assert_array_equal(answers(z), 2 * z)
    assert asked == [3, 3, 3]


def test_moved_mass_and_other_rows_are_noticed():
    z, mass = np.zeros((4, 1)), np.ones(4)
    learned = Learned(z, mass)
    assert not learned.moved(z, mass, 0.01)
    assert not learned.moved(z, mass + np.eye(4)[0] * 0.03, 0.01)
    assert learned.moved(z, mass + np.eye(4)[0] * 0.05, 0.01)
    assert learned.moved(z.copy(), mass, 0.01)
    assert pickle.loads(pickle.dumps(learned)).moved(z, mass, 0.01)


def test_an_estimator_expert_is_asked_once_after_every_training():
    x, y = crossing_lines(0, n=200)
    ASKED.clear()
    model = MixtureOfExpertsRegressor(2, expert=Counting(), n_init=1, random_state=0).fit(x, y)
    assert ASKED.count("predict") == ASKED.count("fit") < 2 * model.n_iter_
    linear = MixtureOfExpertsRegressor(2, n_init=1, random_state=0).fit(x, y)
    assert abs(model.loglik_ - linear.loglik_) < 0.05  # untrained for the last hundredth of the rows


@pytest.mark.parametrize("expert", [LinearRegression(), "gp"], ids=repr)
@pytest.mark.parametrize("rows", [80, 60])
def test_a_warm_start_on_other_rows_learns_them(expert, rows):
    x, y = bent_line(0, n=80)
    model = MixtureOfExpertsRegressor(1, expert=expert, warm_start=True, random_state=0).fit(x, y)
    again = model.fit(x[:rows], 0.1 * y[:rows] + x[:rows, 0])
    assert again.score(x[:rows], 0.1 * y[:rows] + x[:rows, 0]) > 0.9


def test_a_thawed_mixture_predicts_and_goes_on():
    x, y = bent_line(0, n=80)
    model = MixtureOfExpertsRegressor(2, expert=LinearRegression(), warm_start=True, random_state=0).fit(x, y)
    thawed = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(thawed.predict(x), model.predict(x))
    assert thawed.fit(x, y).loglik_ > model.loglik_ - 1e-6
