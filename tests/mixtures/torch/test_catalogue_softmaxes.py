"""Checks of the catalogue: mixture-of-softmaxes and deep-moe-2013."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from moestro.mixtures.torch import DeepMixtureOfExperts, MixtureOfSoftmaxes

# mixture-of-softmaxes


def lively(module, std=0.5):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return module.double()


def dense_formula(model, c):
    """Loops over positions and experts, probabilities instead of logarithms."""
    out = []
    for position in c.reshape(-1, c.shape[-1]):
        share = (model.router.scorer.weight @ position).softmax(0)
        total = 0
        for i in range(model.num_experts):
            context = (position @ model.context.weight[i] + model.context.bias[i]).tanh()
            total = total + share[i] * (model.decoder.weight @ context + model.decoder.bias).softmax(0)
        out.append(total.log())
    return torch.stack(out).view(*c.shape[:-1], -1)


def test_mixture_of_softmaxes_equals_its_formula_with_every_gradient():
    model = lively(MixtureOfSoftmaxes(4, 7, num_experts=3, embedding=5))
    c = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    got, expected = model(c), dense_formula(model, c)
    assert_close(got, expected)
    inputs, probe = [c, *model.parameters()], torch.randn_like(got)
    for g, w in zip(
        torch.autograd.grad(got, inputs, probe), torch.autograd.grad(expected, inputs, probe), strict=True
    ):
        assert_close(g, w)


def test_mixture_of_softmaxes_of_one_expert_is_a_bottleneck_and_a_softmax():
    model, c = lively(MixtureOfSoftmaxes(4, 7, num_experts=1, embedding=5)), torch.randn(6, 4).double()
    context = (c @ model.context.weight[0] + model.context.bias[0]).tanh()
    assert_close(model(c), model.decoder(context).log_softmax(1))


def test_mixture_of_softmaxes_rows_sum_to_one():
    model = lively(MixtureOfSoftmaxes(4, 50, num_experts=3, embedding=5), std=3.0)
    assert_close(model(torch.randn(20, 4).double()).logsumexp(1), torch.zeros(20).double(), atol=1e-12, rtol=0)


def test_mixture_of_softmaxes_breaks_the_rank_of_one_softmax():
    """Width 3, 60 words, 200 contexts: rank 4 = width + 1 for one softmax, full rank for three."""
    torch.manual_seed(0)
    c, words = torch.randn(200, 3).double(), torch.randn(60, 3).double()
    assert np.linalg.matrix_rank((c @ words.T).log_softmax(1).numpy(), tol=1e-8) == 4
    one, three = (lively(MixtureOfSoftmaxes(3, 60, num_experts=n, embedding=3), std=1.0) for n in (1, 3))
    for model in (one, three):
        torch.nn.init.zeros_(model.decoder.bias)  # which is a rank of its own
    share = three.router(c).probs
    mean = torch.einsum("te,tew->tw", share, three._contexts(c)[1])  # mixture of contexts
    ranks = [
        np.linalg.matrix_rank(table.detach().numpy(), tol=1e-8)
        for table in (
            one(c),
            three.decoder(mean).log_softmax(1),
            three(c),
        )
    ]
    assert ranks == [4, 4, 60]


def test_mixture_of_softmaxes_counts_its_parameters():
    d, vocabulary, num, e = 6, 11, 3, 4
    model = MixtureOfSoftmaxes(d, vocabulary, num, e)
    assert sum(p.numel() for p in model.parameters()) == d * num + num * (d * e + e) + vocabulary * e + vocabulary


def test_mixture_of_softmaxes_loss_is_chunked_weighted_and_tied():
    words = torch.nn.Embedding(7, 5).double()
    model = MixtureOfSoftmaxes(4, 7, 3, 5, tie_weight=words.weight, chunk=4).double()
    assert model.decoder.weight is words.weight
    c = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    target, weight = torch.randint(7, (2, 5)), torch.tensor([[1.0, 1, 0, 2, 1]] * 2)
    plain = -(model(c).gather(2, target[..., None])[..., 0] * weight).sum() / weight.sum()
    loss = model.loss(c, target, weight)
    assert_close(loss, plain)
    inputs = [c, *model.parameters()]
    for g, w in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(plain, inputs), strict=True):
        assert_close(g, w)
    with pytest.raises(ValueError, match="pass \\[vocabulary, embedding\\] = \\[7, 4\\]"):
        MixtureOfSoftmaxes(4, 7, 3, 4, tie_weight=words.weight)
    with pytest.raises(ValueError, match="dropout=1"):
        MixtureOfSoftmaxes(4, 7, dropout=1)


def test_mixture_of_softmaxes_drops_the_same_latents_along_a_sequence():
    model = MixtureOfSoftmaxes(4, 7, 3, 50, dropout=0.5)
    context = model._contexts(torch.randn(1, 1, 4).expand(2, 6, 4))[1].view(2, 6, 3, 50)
    assert_close(context, context[:, :1].expand_as(context))
    assert not torch.equal(context[0], context[1])
    assert 0.3 < float((context == 0).double().mean()) < 0.7
    assert not (model.eval()._contexts(torch.randn(4, 4))[1] == 0).any()


# deep-moe-2013


def net(**options):
    options = {"num_experts": (3, 2), "hidden": (5, 4), "gate_hidden": (6, 7)} | options
    return DeepMixtureOfExperts(8, 3, **options).double()


def test_deep_moe_2013_without_margin_is_the_unconstrained_net():
    model, x = net(margin=math.inf), torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    z = x
    for layer in model.layers:
        scorer, experts = layer.router.scorer, layer.experts
        hidden = (z @ scorer.inner.weight.T + scorer.inner.bias).relu()
        gate = (hidden @ scorer.outer.weight.T + scorer.outer.bias).softmax(1)
        z = sum(gate[:, i, None] * (z @ experts.weight[i] + experts.bias[i]).relu() for i in range(len(gate[0])))
    expected = z @ model.output.weight.T + model.output.bias
    inputs = [x, *model.parameters()]
    assert_close(model(x), expected)
    for g, w in zip(
        torch.autograd.grad(model(x).sin().sum(), inputs),
        torch.autograd.grad(expected.sin().sum(), inputs),
        strict=True,
    ):
        assert_close(g, w)


def test_deep_moe_2013_of_single_experts_is_a_plain_network():
    model, x = net(num_experts=(1, 1)), torch.randn(5, 8).double()
    z = x
    for layer in model.layers:
        z = (z @ layer.experts.weight[0] + layer.experts.bias[0]).relu()
    assert_close(model(x), model.output(z))


def test_deep_moe_2013_running_totals_never_lead_by_more_than_the_margin_and_one():
    """One example at a time, as the paper has it; the gates want the first expert always."""
    model = net(margin=4.0)
    for layer in model.layers:
        layer.router.scorer.outer.bias.data[0] = 8.0
    left_out = 0
    for example in torch.randn(80, 8).double():
        model(example[None])
        for layer in model.layers:
            total = layer.router.total
            assert float(total.max() - total.mean()) <= 5.0
            left_out += int((total - total.mean() > 4.0).any())
    assert left_out > 10
    assert all(gate[:, 0].min() > 0.9 for gate in model.gate_proba(torch.randn(4, 8).double())), (
        "raw, in evaluation"
    )
    before = [layer.router.total.clone() for layer in model.layers]
    model.lift_constraint()
    x = torch.randn(4, 8).double()
    assert_close(model(x), model.eval()(x))
    assert all((a != layer.router.total).any() for a, layer in zip(before, model.layers, strict=True))


def test_deep_moe_2013_counts_its_parameters():
    model = DeepMixtureOfExperts(1296, 10, (4, 4), (100, 100), (50, 50))
    assert sum(p.numel() for p in model.parameters()) == 630_518


def test_deep_moe_2013_refuses_uneven_settings():
    with pytest.raises(ValueError, match="describe different numbers of layers"):
        DeepMixtureOfExperts(8, 3, num_experts=(4,))


def information(gate, label):
    """Mutual information in nats of the expert drawn by the gate and a label."""
    joint = np.stack([gate[label == value].sum(0) for value in np.unique(label)]) / len(gate)
    independent = joint.sum(1, keepdims=True) * joint.sum(0)
    return float((joint * np.log(np.maximum(joint, 1e-12) / independent)).sum())


@pytest.mark.nightly
def test_deep_moe_2013_finds_where_before_what():
    """Digits on a canvas, moved by up to 2: the first gate knows the place better, the second the class."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, label = digits.images / 16, torch.from_numpy(digits.target)
    canvas = np.zeros((25, len(images), 12, 12))
    for place in range(25):
        i, j = divmod(place, 5)
        canvas[place, :, i : i + 8, j : j + 8] = images
    canvas = torch.from_numpy(canvas.reshape(25, len(images), 144)).float()
    votes = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = DeepMixtureOfExperts(144, 10, (4, 4), (30, 30), (20, 20), margin=10.0, constrained_steps=2000)
        optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for _ in range(4000):
            row, place = torch.randint(len(images), (64,)), torch.randint(25, (64,))
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(model(canvas[place, row]), label[row]).backward()
            optimiser.step()
        row, place = torch.randint(len(images), (20000,)), torch.randint(25, (20000,))
        first, second = (gate.double().numpy() for gate in model.gate_proba(canvas[place, row]))
        where, what = place.numpy(), label[row].numpy()
        leaning = [information(g, where) / np.log(25) - information(g, what) / np.log(10) for g in (first, second)]
        votes.append((leaning[0] > 0 > leaning[1], leaning))
    assert sum(vote for vote, _ in votes) >= 2, votes
