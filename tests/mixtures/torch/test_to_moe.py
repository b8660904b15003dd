"""A fitted mixture becomes a layer of the same function that can be trained, and a layer a mixture."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from oracles.planted_mixtures import crossing_counts, crossing_lines, xor
from torch.testing import assert_close

import moestro
from moestro.experts import AffineExperts
from moestro.layers import MoE
from moestro.mixtures import (
    DistributedGPRegressor,
    GatedEnsembleRegressor,
    MixtureOfExpertsClassifier,
    MixtureOfExpertsRegressor,
)
from moestro.mixtures.gates import ExponentialFamilyGate
from moestro.mixtures.torch import from_moe, to_moe
from moestro.routers import TokenChoice, TopK, as_is, softmax
from moestro.routers.dense import EveryExpert
from moestro.routers.gate_networks import Affine

REAL = ["linear", "ridge", "gaussian", "constant", "laplace", "student", "skew-normal", "skew-t"]
GATES = ["softmax", "gaussian", "constant"]
SHORT = {"max_iter": 15, "n_init": 1, "random_state": 0}


def quietly(model, x, y):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fifteen iterations are no convergence
        return model.fit(x, y)


def plane(seed, rows=150, outputs=1):
    """Two planes over two inputs that lie far from 0 and in different units."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, 2)) * [30.0, 0.01] + [2000.0, 1.0]
    side = (x[:, :1] > 2000) * 2.0 - 1
    y = 7 + side * (x[:, 1:] - 1) * [100.0, -50.0] + 0.3 * rng.standard_normal((rows, 2))
    return x, y[:, 0] if outputs == 1 else y


def target_of(expert, y):
    return {"poisson": np.round(np.exp(y / 5)), "gamma": np.exp(y / 5)}.get(expert, y)


def regressors():
    for gate in GATES:
        for expert in (*REAL, "poisson", "gamma"):
            yield pytest.param({"gate": gate, "expert": expert}, id=f"{gate}-{expert}")
    for branching in ((2, 2), (2, 3, 2), (3,)):
        yield pytest.param({"branching": branching}, id=f"tree {branching}")


def check_training(layer, x, loss):
    """Gradients are finite and reach every part; a few steps lower the loss."""
    first = loss(layer(x))
    gradients = torch.autograd.grad(first, list(layer.parameters()), allow_unused=True)
    for (name, _), gradient in zip(layer.named_parameters(), gradients, strict=True):
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert gradient.abs().sum() > 0, name
    optimiser = torch.optim.LBFGS(layer.parameters(), max_iter=8, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        value = loss(layer(x))
        value.backward()
        return value

    optimiser.step(closure)
    assert loss(layer(x)) < first


@pytest.mark.parametrize("options", list(regressors()))
def test_the_layer_predicts_what_the_mixture_predicts_and_trains(options):
    x, y = plane(0)
    y = target_of(options.get("expert"), y)
    model = MixtureOfExpertsRegressor(**options, **SHORT)
    model = quietly(model, x, y)
    new = np.vstack([x, plane(1)[0], model.scaling_.x_center + 4 * model.scaling_.x_scale * np.eye(2)])
    layer, inputs = model.to_moe(), torch.from_numpy(new)
    assert_close(layer(inputs)[:, 0], torch.from_numpy(model.predict(new)), rtol=1e-6, atol=1e-6)
    assert_close(layer.route(inputs).probs, torch.from_numpy(model.gate_proba(new)), rtol=1e-6, atol=1e-9)
    # trained on standardised inputs, where one step size suits all parameters
    model = quietly(model, (x - x.mean(0)) / x.std(0), y)
    layer, target = to_moe(model), torch.from_numpy(y)[:, None]
    check_training(layer, torch.from_numpy((x - x.mean(0)) / x.std(0)), lambda out: (out - target).square().mean())


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("expert", ["linear", "gaussian", "constant"])
def test_several_outputs(gate, expert):
    x, y = plane(0, outputs=2)
    model = quietly(MixtureOfExpertsRegressor(3, gate=gate, expert=expert, **SHORT), x, y)
    got = to_moe(model)(torch.from_numpy(x).unflatten(0, (3, 50)))
    assert_close(got.flatten(0, 1), torch.from_numpy(model.predict(x)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{"gate": gate} for gate in GATES] + [{"branching": (2, 2)}], ids=str)
@pytest.mark.parametrize(
    ("expert", "classes"), [("logistic", 2), ("multinomial", 2), ("multinomial", 3), ("constant", 3)]
)
def test_the_layer_gives_the_class_probabilities_and_trains(options, expert, classes):
    x, label = xor(0, n=200)
    label = label + (x[:, 0] > 0.5) * (classes - 2)
    model = quietly(MixtureOfExpertsClassifier(expert=expert, **options, **SHORT), x, label)
    layer, inputs = to_moe(model), torch.from_numpy(x)
    assert_close(layer(inputs), torch.from_numpy(model.predict_proba(x)), rtol=1e-6, atol=1e-6)
    target = torch.from_numpy(label)
    noisy = torch.where(torch.arange(200) % 10 == 0, (target + 1) % classes, target)  # a perfect fit has no slope
    check_training(layer, inputs, lambda out: -out.gather(1, noisy[:, None]).clamp(min=1e-12).log().mean())


def test_one_expert_is_that_expert_and_float32_is_close():
    x, y = crossing_lines(0, n=200)
    for num in (1, 2):
        model = MixtureOfExpertsRegressor(num, n_init=1).fit(x, y)
        got = to_moe(model, dtype=torch.float32)(torch.from_numpy(x).float())
        assert_close(got[:, 0].double(), torch.from_numpy(model.predict(x)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{"n_experts": 2}, {"branching": (2, 2)}, {"gate": "gaussian"}, {"n_experts": 1}], ids=str
)
def test_there_and_back(options):
    x, y = crossing_lines(1, n=400)
    x = x * 3 + 100
    model = MixtureOfExpertsRegressor(tol=1e-10, random_state=0, n_init=2, max_iter=2000, **options)
    model = quietly(model, x, y)
    back = from_moe(to_moe(model), x, y)
    np.testing.assert_allclose(back.predict(x), model.predict(x), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(back.gate_proba(x), model.gate_proba(x), atol=1e-8)
    np.testing.assert_allclose(back.expert_variance_, model.expert_variance_, rtol=2e-2)
    assert abs(back.loglik_ - model.loglik_) < 0.02
    assert back.n_parameters_ == model.n_parameters_
    assert back.summary(x, y).startswith("MixtureOfExpertsRegressor")


def test_there_and_back_for_counts_and_classes():
    x, y = crossing_counts(0, n=300)
    model = MixtureOfExpertsRegressor(expert="poisson", n_init=1).fit(x, y)
    back = from_moe(to_moe(model), x, y)
    np.testing.assert_allclose(back.predict(x), model.predict(x), rtol=1e-9)
    assert back.loglik_ == pytest.approx(model.loglik_, rel=1e-9)
    x, label = xor(0, n=200)
    names = np.array(["black", "white"])[label]
    model = quietly(MixtureOfExpertsClassifier(expert="logistic", **SHORT), x, names)
    back = from_moe(to_moe(model), x, names)
    np.testing.assert_allclose(back.predict_proba(x), model.predict_proba(x), atol=1e-9)
    assert back.predict(x).tolist() == model.predict(x).tolist()


def test_the_spread_read_back_is_the_most_likely_one():
    """No other variances, tried one by one, explain the rows better."""
    x, y = crossing_lines(2, n=300)
    layer = to_moe(MixtureOfExpertsRegressor(2, n_init=1).fit(x, y))
    torch.nn.init.normal_(layer.experts.bias, std=0.5)
    torch.manual_seed(0)
    back = from_moe(layer, x, y)
    coef, bias = back.expert_coef_[:, 0, 0], back.expert_intercept_[:, 0]
    share, error = back.gate_proba(x), y[:, None] - (x * coef + bias)

    def loglik(variance):
        density = np.exp(-0.5 * error**2 / variance) / np.sqrt(2 * np.pi * variance)
        return np.log((share * density).sum(1)).sum()

    best = loglik(back.expert_variance_[:, 0])
    assert back.loglik_ == pytest.approx(best, abs=1e-6)
    for expert in range(2):
        for factor in (0.97, 1.03):
            variance = back.expert_variance_[:, 0].copy()
            variance[expert] *= factor
            assert loglik(variance) < best


def test_a_layer_trained_by_gradients_becomes_a_mixture_that_em_goes_on_with():
    x, y = crossing_lines(0, n=500)
    torch.manual_seed(1)
    experts = AffineExperts(2, 1, 1).double()
    layer = MoE(TokenChoice(Affine(1, 2, std=1.0).double(), EveryExpert(2), softmax, as_is), experts)
    optimiser = torch.optim.Adam(layer.parameters(), 0.05)
    for _ in range(100):
        optimiser.zero_grad()
        (layer(torch.from_numpy(x))[:, 0] - torch.from_numpy(y)).square().mean().backward()
        optimiser.step()
    model = from_moe(layer, x, y)
    np.testing.assert_allclose(model.predict(x), layer(torch.from_numpy(x)).detach()[:, 0].numpy(), atol=1e-9)
    before = model.loglik_
    model.set_params(warm_start=True).fit(x, y)
    assert model.loglik_ > before + 1


@pytest.mark.parametrize(
    "families", ["gaussian", "poisson", "exponential", ("bernoulli", "poisson", "exponential")]
)
def test_a_gate_of_an_exponential_family_becomes_a_layer(families):
    rng = np.random.default_rng(0)
    x = np.column_stack([rng.integers(0, 2, 200), rng.poisson(3, 200), rng.exponential(2, 200)]).astype(float)
    y = np.where(x[:, 1] > 3, x[:, 2], -x[:, 2]) + 0.1 * rng.standard_normal(200)
    gate = ExponentialFamilyGate(families)
    model = quietly(MixtureOfExpertsRegressor(3, gate=gate, **SHORT), x, y)
    layer, inputs = to_moe(model), torch.from_numpy(x)
    assert_close(layer(inputs)[:, 0], torch.from_numpy(model.predict(x)), rtol=1e-6, atol=1e-6)
    assert_close(layer.route(inputs).probs, torch.from_numpy(model.gate_proba(x)), rtol=1e-6, atol=1e-9)
    target = torch.from_numpy(y)[:, None]
    check_training(layer, inputs, lambda out: (out - target).square().mean())


def test_a_gate_of_mixed_families_is_no_layer():
    x, y = crossing_lines(0, n=60)
    gate = ExponentialFamilyGate(("gaussian", "exponential"))
    model = quietly(MixtureOfExpertsRegressor(gate=gate, **SHORT), np.hstack([x, x**2]), y)
    with pytest.raises(ValueError, match="families exponential, gaussian cannot become part of a layer"):
        to_moe(model)


def test_what_is_no_layer_says_so():
    x, y = crossing_lines(0, n=60)
    with pytest.raises(ValueError, match="DistributedGPRegressor has no gate and affine experts that a layer"):
        to_moe(DistributedGPRegressor())
    with pytest.raises(ValueError, match="GatedEnsembleRegressor has no gate and affine experts that a layer"):
        to_moe(GatedEnsembleRegressor())
    with pytest.raises(ValueError, match="not fitted yet"):
        to_moe(MixtureOfExpertsRegressor())
    model = quietly(MixtureOfExpertsRegressor(**SHORT), x, y)
    model.mixture_ = type(model.mixture_)(object(), model.mixture_.expert, {}, {})
    with pytest.raises(ValueError, match="object cannot become part of a layer; fit one of SoftmaxGate"):
        to_moe(model)


def test_what_is_no_mixture_says_so():
    x, y = crossing_lines(0, n=60)
    dense = to_moe(quietly(MixtureOfExpertsRegressor(**SHORT), x, y))
    sparse = MoE(TokenChoice(Affine(1, 2), TopK(1), softmax, as_is), AffineExperts(2, 1, 1))
    for other in (sparse, torch.nn.Linear(1, 1), moestro.build("switch", width=1, hidden=2, num_experts=2)):
        with pytest.raises(ValueError, match="this layer has another router"):
            from_moe(other, x, y)
    with pytest.raises(ValueError, match="this layer has GLU"):
        from_moe(moestro.build("dense-softmax", width=1, hidden=2, num_experts=2, activation="swiglu"), x, y)
    with pytest.raises(ValueError, match="and a shared expert"):
        from_moe(MoE(dense.router, dense.experts, shared=torch.nn.Identity()), x, y)
    with pytest.raises(ValueError, match="maps 1 inputs to 1 outputs, but X has 2 columns"):
        from_moe(dense, np.hstack([x, x]), y)


def test_importing_mixtures_imports_no_torch():
    code = "import sys, moestro.mixtures, moestro.mixtures.plot; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
