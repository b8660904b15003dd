"""Gradient fitting reaches what EM reaches; the errors of 1991 do what they are for."""

import numpy as np
import pytest
from oracles.planted_mixtures import bent_line, crossing_counts, crossing_lines, xor
from sklearn.linear_model import LinearRegression, Ridge

from moestro.mixtures import MixtureOfExpertsClassifier, MixtureOfExpertsRegressor
from moestro.mixtures.experts import GaussianExpert
from moestro.mixtures.gates import GATES


def finite_differences(mixture, rows):
    center = mixture.free()
    slopes = []
    for k in range(len(center)):
        step = np.zeros_like(center)
        step[k] = 1e-5
        slopes.append(
            (mixture.restore(center + step).objective(rows) - mixture.restore(center - step).objective(rows)) / 2e-5
        )
    return np.array(slopes)


@pytest.mark.parametrize("gate", [name for name, gate in GATES.items() if gate().parametric])
@pytest.mark.parametrize("expert", ["ridge", "gaussian", "student", "skew-normal", "skew-t", "poisson", "gamma"])
def test_hierarchies_adaptive_experts_gradients_are_those_of_finite_differences(gate, expert):
    x, y = crossing_counts(0, n=80)
    y = y + 0.5 * (expert != "poisson")
    if expert in ("gaussian", "student"):
        y = np.column_stack([y, x[:, 0] ** 2])
    options = {"branching": (2, 2)} if gate == "softmax" else {"n_experts": 2}
    fitted = MixtureOfExpertsRegressor(gate=gate, expert=expert, n_init=1, tol=1e-2, **options).fit(x, y)
    rows = fitted._rows_of(x, y, None)
    slope = fitted.mixture_.gradient(rows)
    assert len(slope) == fitted.n_parameters_
    np.testing.assert_allclose(
        slope, finite_differences(fitted.mixture_, rows), rtol=1e-3, atol=1e-5 * (1 + np.abs(slope).max())
    )


def test_multinomial_gradients_are_those_of_finite_differences():
    x, y = xor(0, n=80)
    fitted = MixtureOfExpertsClassifier(3, n_init=1, tol=1e-2).fit(x, y + (x[:, 0] > 0.5))
    rows = fitted._rows_of(x, y + (x[:, 0] > 0.5), None)
    slope = fitted.mixture_.gradient(rows)
    np.testing.assert_allclose(slope, finite_differences(fitted.mixture_, rows), atol=1e-6)


def test_hierarchies_adaptive_experts_em_stops_where_the_gradient_is_zero():
    x, y = crossing_lines(0, n=300)
    fitted = MixtureOfExpertsRegressor(
        branching=(2,), expert="gaussian", random_state=0, tol=1e-12, max_iter=5000
    ).fit(x, y)
    assert np.abs(fitted.mixture_.gradient(fitted._rows_of(x, y, None))).max() < 1e-2


def test_expfam_gate_an_em_step_is_a_preconditioned_gradient_step():
    """Jordan & Xu 1995: the experts' step is `P ∂LL/∂β` with `P = σ² (sum h z zᵀ)⁻¹`."""
    x, y = crossing_lines(0, n=200)
    fitted = MixtureOfExpertsRegressor(2, n_init=1, tol=1e-3).fit(x, y)
    rows, mixture = fitted._rows_of(x, y, None), fitted.mixture_
    mass = fitted.responsibilities(x, y)
    moved = mixture.expert.m_step(rows, mass, mixture.expert_params, None)
    slope = mixture.expert.gradient(rows, mass, mixture.expert_params)[:4].reshape(2, 2)
    for i in range(2):
        variance = mixture.expert_params["covariance"][i, 0, 0]
        curvature = rows.z.T @ (mass[:, i, None] * rows.z)
        step = variance * np.linalg.solve(curvature, slope[i])
        np.testing.assert_allclose(
            moved["coef"][i, :, 0] - mixture.expert_params["coef"][i, :, 0], step, atol=1e-10
        )


@pytest.mark.parametrize("expert", ["linear", "student"])
def test_jacobs_1991_gradient_reaches_the_likelihood_of_em(expert):
    x, y = crossing_lines(0, n=600)
    em = MixtureOfExpertsRegressor(2, expert=expert, random_state=0, tol=1e-7).fit(x, y)
    gradient = MixtureOfExpertsRegressor(2, expert=expert, algorithm="gradient", random_state=0, tol=1e-8).fit(x, y)
    assert gradient.loglik_ > em.loglik_ - 0.05


def test_jacobs_1991_fixed_unit_variances_by_gradient_and_by_em():
    x, y = crossing_lines(0, n=600)
    options = {"expert": GaussianExpert(fixed_variance=1.0), "random_state": 0, "tol": 1e-9, "max_iter": 2000}
    fits = [MixtureOfExpertsRegressor(2, algorithm=name, **options).fit(x, y) for name in ("em", "gradient")]
    np.testing.assert_allclose(fits[0].loglik_, fits[1].loglik_, atol=0.01)


@pytest.mark.parametrize("loss", ["expected", "blend"])
def test_jacobs_1991_one_expert_is_least_squares(loss):
    x, y = bent_line(0)
    one = MixtureOfExpertsRegressor(1, algorithm="gradient", loss=loss, tol=1e-13).fit(x, y)
    np.testing.assert_allclose(one.predict(x), LinearRegression().fit(x, y).predict(x), atol=1e-5)
    one = MixtureOfExpertsRegressor(1, expert="ridge", algorithm="gradient", loss=loss, tol=1e-13).fit(x, y)
    np.testing.assert_allclose(one.predict(x), Ridge().fit(x, y).predict(x), atol=1e-5)


def test_jacobs_1991_blending_fits_the_mean_best_and_uses_more_experts():
    x, y = crossing_lines(0)
    fits = {
        loss: MixtureOfExpertsRegressor(2, algorithm="gradient", loss=loss, random_state=0).fit(x, y)
        for loss in ("mixture", "blend")
    }
    error = {loss: np.mean((fitted.predict(x) - y) ** 2) for loss, fitted in fits.items()}
    assert error["blend"] <= error["mixture"]

    # the path is minus the mean error of standardised targets, up to the ridges
    fitted = fits["blend"]
    np.testing.assert_allclose(-fitted.lower_bound_, error["blend"] / y.var(), rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "blend"}, "needs algorithm='gradient'"),
        ({"algorithm": "gradient", "loss": "hinge"}, "loss='hinge' is unknown"),
        ({"algorithm": "gradient", "expert": "laplace"}, "needs a smooth density"),
        ({"algorithm": "gradient", "loss": "blend", "gate": "constant"}, "flat softmax gate"),
        ({"algorithm": "gradient", "loss": "blend", "branching": (2, 2)}, "flat softmax gate"),
        ({"algorithm": "gradient", "loss": "expected", "expert": "student"}, "normal experts"),
    ],
)
def test_a_bad_combination_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MixtureOfExpertsRegressor(**options).fit(*bent_line(0, n=30))
