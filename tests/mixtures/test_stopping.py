"""When a fit stops, and how far from the top it then is."""

import numpy as np
import pytest
from oracles.planted_mixtures import crossing_lines

from moestro.mixtures import MixtureOfExpertsClassifier, MixtureOfExpertsRegressor
from moestro.mixtures.fitting.stopping import by_aitken, by_change


def test_a_geometric_path_stops_where_its_rest_is_small_enough():
    path = 5 - 0.9 ** np.arange(200)  # the rest after step t is 0.9^t
    first = next(t for t in range(200) if by_aitken(path[: t + 1], 1e-3))
    assert first == int(np.ceil(np.log(1e-3) / np.log(0.9)))
    assert next(t for t in range(1, 200) if by_change(path[: t + 1], 1e-3)) < first


@pytest.mark.parametrize(
    ("path", "stops"),
    [
        ([1.0], False),
        ([1.0, 1.0], True),
        ([1.0, 1.0 + 1e-9], False),
        ([0.0, 1.0, 3.0], False),
        ([0.0, 1.0, 0.9], False),
    ],
)
def test_aitken_waits_while_steps_grow_or_turn(path, stops):
    assert by_aitken(path, 1e-3) is stops


def test_a_fit_over_a_plateau_ends_within_tol_of_its_top():
    x, y = crossing_lines(0, n=500)
    options = {
        "n_experts": 3,
        "gate": "gaussian",
        "n_init": 1,
        "init": "random",
        "random_state": 1,
        "max_iter": 1000,
    }
    top = MixtureOfExpertsRegressor(tol=1e-10, **options).fit(x, y).loglik_path_[-1]
    short = {
        rule: top - MixtureOfExpertsRegressor(tol=1e-5, stopping=rule, **options).fit(x, y).loglik_path_[-1]
        for rule in ("change", "aitken")
    }
    assert short["aitken"] < 1e-5 * 500
    assert short["change"] > 1000 * 1e-5 * 500  # a small step on the plateau ended it


def test_a_classifier_stops_by_aitken():
    x, y = crossing_lines(0, n=200)
    fitted = MixtureOfExpertsClassifier(stopping="aitken", tol=1e-3, n_init=1, random_state=0).fit(x, y > 0)
    assert fitted.converged_


@pytest.mark.parametrize(
    "options", [{"stopping": "soon"}, {"stopping": "aitken", "algorithm": "gradient"}], ids=lambda o: o["stopping"]
)
def test_a_rule_that_does_not_apply_is_refused(options):
    with pytest.raises(ValueError, match="is unknown or no rule of algorithm"):
        MixtureOfExpertsRegressor(**options).fit(*crossing_lines(0, n=30))
