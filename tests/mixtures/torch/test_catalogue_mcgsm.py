"""Checks of the catalogue: mcgsm and spatial-lstm."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from moestro.mixtures import MixtureOfExpertsRegressor
from moestro.mixtures.torch import MCGSM, RecurrentImageDensity, SpatialLSTM, causal_neighbourhood, dequantise


def lively(module, std=0.4):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return module.double()


def slow_log_prob(model, x, y):
    """Loops over rows, components and scales; covariances instead of factors."""
    e, out = model.energies, []
    components, scales = e.offset.shape
    for row, target in zip(x, y, strict=True):
        joint, gate = [], []
        for c in range(components):
            quadratic = sum(e.weight[c, f] ** 2 * (e.feature[f] @ row) ** 2 for f in range(len(e.feature)))
            lower = torch.eye(len(target)).double()
            for i in range(len(target)):
                for j in range(i):
                    lower[i, j] = model.factor[c, i, j]
                if i:
                    lower[i, i] = model.factor[c, i, i].exp()
            for s in range(scales):
                precision = e.log_precision[c, s].exp()
                energy = e.offset[c, s] - precision / 2 * (quadratic - 2 * e.slope[c] @ row)
                mean = row @ model.experts.weight[c] + model.experts.bias[c]
                normal = torch.distributions.MultivariateNormal(mean, precision_matrix=precision * lower @ lower.T)
                joint.append(energy + normal.log_prob(target))
                gate.append(energy)
        out.append(torch.stack(joint).logsumexp(0) - torch.stack(gate).logsumexp(0))
    return torch.stack(out)


# mcgsm


@pytest.mark.parametrize("outputs", [1, 3])
def test_mcgsm_equals_its_formula_with_every_gradient(outputs):
    torch.manual_seed(0)
    model = lively(MCGSM(4, outputs, 3, 2, 5))
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(5, outputs, dtype=torch.float64)
    got, expected = model.log_prob(x, y), slow_log_prob(model, x, y)
    assert_close(got, expected)
    inputs, probe = [x, *model.parameters()], torch.randn(5).double()
    for g, w in zip(
        torch.autograd.grad(got, inputs, probe),
        torch.autograd.grad(expected, inputs, probe, allow_unused=True),
        strict=True,
    ):
        assert_close(g, torch.zeros_like(g) if w is None else w)


def test_mcgsm_gradient_equals_finite_differences():
    torch.manual_seed(1)
    model = lively(MCGSM(2, 2, 2, 2, 2))
    x, y = torch.randn(3, 2).double(), torch.randn(3, 2).double()
    names = [name for name, _ in model.named_parameters()]

    def density(*values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x, y))

    assert torch.autograd.gradcheck(density, tuple(model.parameters()))


def test_mcgsm_of_one_component_and_scale_is_linear_regression():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 3))
    y = x @ rng.standard_normal((3, 2)) + [1.0, -2.0] + rng.standard_normal((300, 2)) @ [[1.0, 0.5], [0.0, 0.3]]
    linear = MixtureOfExpertsRegressor(1, expert="gaussian").fit(x, y)
    torch.manual_seed(0)
    rows, target = torch.from_numpy(x), torch.from_numpy(y)
    model = MCGSM(3, 2, 1, 1).double().initialise(rows, target).fit(rows, target)
    assert float(model.log_prob(rows, target).detach().sum()) == pytest.approx(linear.loglik_, abs=1e-3)
    assert_close(model.predict(rows).detach(), torch.from_numpy(linear.predict(x)), atol=1e-3, rtol=0)


def test_mcgsm_without_inputs_is_a_mixture_of_scale_mixtures():
    torch.manual_seed(2)
    model, y = lively(MCGSM(1, 1, 2, 3, 1)), torch.linspace(-3, 3, 7).double()[:, None]
    torch.nn.init.zeros_(model.experts.bias)
    share = model.energies.offset.flatten().softmax(0)
    normals = torch.distributions.Normal(0.0, (-0.5 * model.energies.log_precision).exp().flatten())
    assert_close(model.log_prob(torch.zeros(7, 1).double(), y), (share.log() + normals.log_prob(y)).logsumexp(1))


def test_mcgsm_integrates_to_one_and_its_mean_is_the_layer():
    torch.manual_seed(3)
    model, grid = lively(MCGSM(2, 1, 4, 3, 2)), torch.linspace(-60, 60, 60001).double()[:, None]
    for row in torch.randn(3, 2).double():
        density = model.log_prob(row.expand(len(grid), 2), grid).exp().detach()
        assert_close(torch.trapezoid(density, grid[:, 0]), torch.tensor(1.0).double(), atol=1e-9, rtol=0)
        mean = torch.trapezoid(density * grid[:, 0], grid[:, 0])
        assert_close(model.predict(row[None])[0, 0].detach(), mean, atol=1e-7, rtol=0)
        assert_close(model.layer(row)[0].detach(), mean, atol=1e-7, rtol=0)


def test_mcgsm_without_quadratic_features_has_a_softmax_gate():
    torch.manual_seed(4)
    model, x = lively(MCGSM(3, 1, 4, 1)), torch.randn(6, 3).double()
    torch.nn.init.zeros_(model.energies.weight)
    torch.nn.init.zeros_(model.energies.log_precision)
    logits = model.energies.offset[:, 0] + x @ model.energies.slope.T
    assert_close(model.prior(x), logits.softmax(1))


def test_mcgsm_posterior_is_bayes_rule_and_samples_follow_the_density():
    torch.manual_seed(5)
    model, x = lively(MCGSM(2, 2, 3, 2)), torch.randn(1, 2).double()
    y = torch.randn(4, 2).double()
    rows = x.expand(4, 2)
    joint = model.energies.joint(rows) + model._log_experts(rows, y)
    expected = joint.exp().sum(2) / joint.exp().sum((1, 2))[:, None]
    assert_close(model.posterior(rows, y), expected)
    drawn = model.sample(x.expand(200_000, 2), torch.Generator().manual_seed(0))
    assert_close(drawn.mean(0), model.predict(x)[0].detach(), atol=0.02, rtol=0)
    inside = (drawn < 0).all(1).double().mean()  # a quadrant, by quadrature of the density
    line = torch.linspace(-12, 0, 601).double()
    grid = torch.cartesian_prod(line, line)
    density = model.log_prob(x.expand(len(grid), 2), grid).exp().detach().view(601, 601)
    assert float(inside) == pytest.approx(float(torch.trapezoid(torch.trapezoid(density, line), line)), abs=0.005)
    assert model.loss(rows, y).item() == pytest.approx(-model(rows, y).mean().item() / (2 * math.log(2)))


def test_mcgsm_learns_noise_whose_size_depends_on_the_input():
    """A scale that grows with |x|: the linear model of constant noise loses."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2000, 1))
    y = 0.5 * x + (0.1 + np.abs(x)) * rng.standard_normal((2000, 1))
    rows, target = torch.from_numpy(x), torch.from_numpy(y)
    torch.manual_seed(0)
    model = MCGSM(1, 1, 4, 2).double().initialise(rows, target).fit(rows, target, max_iter=150)
    truth = -np.log(0.1 + np.abs(x)) - 0.5 * np.log(2 * np.pi) - 0.5 * ((y - 0.5 * x) / (0.1 + np.abs(x))) ** 2
    linear = MixtureOfExpertsRegressor(1).fit(x, y[:, 0]).loglik_ / 2000
    gained = model.log_prob(rows, target).mean().item() - linear
    assert gained > 0.95 * (truth.mean() - linear) > 0.2  # of what knowing the truth would gain


# spatial-lstm


def slow_states(cell, x):
    """Pixel by pixel."""
    batch, rows, columns, _ = x.shape
    zero = x.new_zeros(batch, cell.hidden)
    c, h = {}, {}
    for i in range(rows):
        for j in range(columns):
            left, up = (i, j - 1), (i - 1, j)
            inputs = torch.cat([x[:, i, j], h.get(left, zero), h.get(up, zero)], 1)
            g, o, gate, f_r, f_c = (inputs @ cell.cell.weight.T + cell.cell.bias).split(cell.hidden, 1)
            c[i, j] = (
                g.tanh() * gate.sigmoid() + c.get(left, zero) * f_c.sigmoid() + c.get(up, zero) * f_r.sigmoid()
            )
            h[i, j] = torch.tanh(c[i, j] * o.sigmoid())
    return torch.stack([torch.stack([h[i, j] for j in range(columns)], 1) for i in range(rows)], 1)


@pytest.mark.parametrize(("rows", "columns"), [(3, 5), (4, 2), (1, 3), (3, 1), (1, 1)])
def test_spatial_lstm_equals_the_loop_over_pixels_with_every_gradient(rows, columns):
    cell = lively(SpatialLSTM(3, 4))
    x = torch.randn(2, rows, columns, 3, dtype=torch.float64, requires_grad=True)
    got, expected = cell(x), slow_states(cell, x)
    assert_close(got, expected)
    inputs, probe = [x, *cell.parameters()], torch.randn_like(got)
    for g, w in zip(
        torch.autograd.grad(got, inputs, probe), torch.autograd.grad(expected, inputs, probe), strict=True
    ):
        assert_close(g, w)


def small(**options):
    return RecurrentImageDensity(
        **{"channels": 1, "hidden": 4, "num_components": 3, "num_scales": 2, "num_features": 3} | options
    )


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "channels": 2}, {"neighbourhood": 3}], ids=str)
def test_spatial_lstm_is_causal(options):
    """A pixel changes only itself and what comes after it in reading order, and does change that."""
    model = lively(small(**options))
    images = torch.randn(1, 5, 6, options.get("channels", 1)).double()
    before = model(images).flatten()
    for pixel in (0, 9, 17, 29):
        other = images.clone().flatten(0, 2)
        other[pixel] += 1.0
        changed = (model(other.view_as(images)).flatten() != before).nonzero().flatten()
        assert changed[0] == pixel
        assert (len(changed) > 1) == (pixel < 29)


def test_spatial_lstm_of_one_pixel_is_the_mcgsm():
    model, images = lively(small()), torch.randn(3, 1, 1, 1).double()
    cell = model.layers[0]
    g, o, i, _, _ = cell.cell.bias.chunk(5)
    state = (g.tanh() * i.sigmoid() * o.sigmoid()).tanh().expand(3, 4)
    assert_close(model(images).flatten(), model.density(state, images.view(3, 1)))


def test_spatial_lstm_counts_its_parameters():
    assert sum(p.numel() for p in SpatialLSTM(12, 64).parameters()) == 5 * 64 * (12 + 2 * 64 + 1)


def test_spatial_lstm_sees_above_and_left():
    image = torch.arange(1.0, 26).view(1, 5, 5, 1)
    seen = causal_neighbourhood(image, 3)[0]
    assert seen[2, 2].tolist() == [7, 8, 9, 12]
    assert seen[0, 0].tolist() == [0, 0, 0, 0]
    assert seen[3, 4].tolist() == [14, 15, 0, 19]
    assert causal_neighbourhood(image, 5).shape[-1] == 12
    with pytest.raises(ValueError, match="neighbourhood=4 must be odd"):
        small(neighbourhood=4)


def test_spatial_lstm_ensemble_dequantisation_and_samples():
    model, images = lively(small(), 0.2), torch.randn(2, 3, 3, 1).double()
    turned = [images.rot90(k, (1, 2)) for k in range(4)]
    turned += [image.flip(1) for image in turned]
    each = torch.stack([model(image).sum((1, 2)) for image in turned])
    assert_close(model.ensemble_log_prob(images), each.exp().mean(0).log())
    assert model.bits_per_number(images).item() == pytest.approx(-model(images).mean().item() / math.log(2))
    pixels = torch.tensor([0, 255, 7])
    spread = dequantise(pixels, generator=torch.Generator().manual_seed(0))
    assert ((spread * 256).floor() == pixels).all()
    assert spread.max() < 1
    drawn = [model.sample(2, 3, 4, torch.Generator().manual_seed(0)) for _ in range(2)]
    assert drawn[0].shape == (2, 3, 4, 1)
    assert torch.equal(*drawn)


def test_spatial_lstm_learns_an_image_better_than_independent_pixels():
    torch.manual_seed(0)
    base = torch.randn(16, 10, 1, 1).expand(16, 10, 10, 1)  # rows of one brightness each
    images = base + 0.1 * torch.randn(16, 10, 10, 1)
    model = small(hidden=8)
    optimiser = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimiser.zero_grad()
        loss = model.bits_per_number(images)
        loss.backward()
        optimiser.step()
    independent = 0.5 * math.log2(2 * math.pi * math.e * float(images.var()))
    assert loss.item() < independent - 0.5
