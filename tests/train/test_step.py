"""One step: exact weighting of tokens, auxiliary losses in, bad numbers out."""

import re

import pytest
import torch
from oracles.operators import Calls
from torch.nn import functional as F
from torch.testing import assert_close

import moestro
from moestro.data import Batch
from moestro.train.errors import NonFiniteLoss
from moestro.train.machine import choose_machine
from moestro.train.step import Stepper

MACHINE = choose_machine("cpu", "float32", 1)
METHODS = {"mixtral": {"balance": 0.5}, "deepseek-v3": {"top_k": 2, "bias_rate": 0.125}, None: {}}


def language_model(method="mixtral", **options):
    return moestro.build_language_model(
        vocab_size=16,
        width=8,
        num_layers=2,
        num_heads=2,
        method=method,
        options={**METHODS[method], **options},
        num_experts=4,
        expert_hidden=8,
        seed=0,
    )


def stepper(model, learning_rate=0.0, **options):
    optimiser = torch.optim.SGD(model.parameters(), lr=learning_rate)
    log = moestro.RoutingLog(model) if model.config["method"] else None
    return Stepper(model, optimiser, MACHINE, log, **options)


def batch(size=4, length=6):
    tokens = torch.randint(16, (size, length + 1))
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.zeros(size, length, dtype=torch.uint8), size * length)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_gives_the_gradient_of_the_whole_batch(parts):
    whole, split, text = language_model(balance=0.0), language_model(balance=0.0), batch()
    a = stepper(whole, clip=0)(text, 1)
    b = stepper(split, clip=0, accumulate=parts)(text, 1)
    assert b.loss == pytest.approx(a.loss, rel=1e-6)
    assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-5)
    assert_close(gradients(split), gradients(whole))


def test_micro_batches_after_the_first_add_to_the_gradients_of_experts_where_they_are():
    model, text = language_model(), batch()
    with Calls() as calls:
        stepper(model, accumulate=4)(text, 1)
        assert calls.in_place == 3 * 2  # two layers
        stepper(language_model())(text, 1)
        assert calls.in_place == 3 * 2


def test_accumulation_counts_an_auxiliary_loss_by_the_share_of_its_tokens():
    half = batch()
    twice = Batch(*(part.repeat(2, 1) for part in (half.tokens, half.targets, half.domain)), 2 * half.num_bytes)
    whole, split = language_model(), language_model()
    a = stepper(whole, clip=0)(twice, 1)
    b = stepper(split, clip=0, accumulate=2)(twice, 1)  # both halves are routed alike
    assert (b.auxiliary_loss, b.named["balance"]) == pytest.approx((a.auxiliary_loss, a.named["balance"]))
    assert_close(gradients(split), gradients(whole))


def test_step_statistics_give_the_gradient_and_the_losses_of_the_whole_batch():
    text, whole, split, parts = batch(8), language_model(), language_model(), language_model()
    a = stepper(whole, clip=0)(text, 1)
    b = stepper(split, clip=0, accumulate=4, statistics="step")(text, 1)
    c = stepper(parts, clip=0, accumulate=4)(text, 1)
    assert (b.auxiliary_loss, b.named["balance"]) == pytest.approx((a.auxiliary_loss, a.named["balance"]))
    assert c.auxiliary_loss != pytest.approx(a.auxiliary_loss, rel=1e-4)  # each micro-batch by itself
    assert_close(gradients(split), gradients(whole), rtol=1e-5, atol=1e-6)


def test_the_loss_is_the_mean_over_tokens_and_the_auxiliary_loss_is_added_to_its_gradient():
    model, text = language_model(), batch()
    result = stepper(model, clip=0)(text, 1)
    measured = gradients(model)
    model.zero_grad()
    log = moestro.RoutingLog(model)
    with log.recording():
        loss = F.cross_entropy(model(text.tokens).flatten(0, 1), text.targets.flatten())
    (loss + log.auxiliary_loss()).backward()
    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    assert result.auxiliary_loss == pytest.approx(log.auxiliary_loss().item(), rel=1e-6)
    assert result.named["balance"] * 0.5 * 2 == pytest.approx(result.auxiliary_loss, rel=1e-6)  # two layers
    assert_close(measured, gradients(model))


def test_the_norm_is_that_before_clipping_and_clipping_reaches_the_limit():
    model, text = language_model(), batch()
    free = stepper(model, clip=0)(text, 1).grad_norm
    assert stepper(model, clip=free / 4)(text, 1).grad_norm == pytest.approx(free, rel=1e-6)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    assert norm == pytest.approx(free / 4, rel=1e-4)


@pytest.mark.parametrize("parts", [1, 2])
def test_controllers_act_once_a_step_on_the_load_of_the_whole_batch(parts):
    model, text = language_model("deepseek-v3"), batch()
    log = moestro.RoutingLog(model.train())
    with log.recording():
        model(text.tokens)
    load = log.decisions["layers.0.moe"][0].routing.load()
    log.close()
    stepper(model, accumulate=parts)(text, 1)
    bias = model.layers[0].moe.router.select.bias
    assert_close(bias, 0.125 * torch.sign(load.float().mean() - load))


def test_a_dense_model_has_no_auxiliary_loss():
    result = stepper(language_model(None))(batch(), 1)
    assert (result.auxiliary_loss, result.named) == (0.0, {})


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("embedding.weight", "weight of embedding.weight"),
        ("layers.1.moe.experts.up", "weight of layers.1.moe.experts[0].up"),
        ("layers.0.moe.router.scorer.weight", "weight of layers.0.moe.router.scorer.weight"),
    ],
)
def test_a_loss_that_is_no_number_names_step_and_module_and_changes_nothing(name, where):
    model = language_model(balance=0.0)
    model.get_parameter(name).data.fill_(float("nan"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(NonFiniteLoss, match=rf"at step 7 \(first in {re.escape(where)}\); lower"):
        stepper(model, learning_rate=1.0)(batch(), 7)
    for key, value in model.state_dict().items():
        assert_close(value, before[key], equal_nan=True)


def test_a_gradient_that_is_no_number_is_noticed_too():
    model = language_model()
    model.layers[1].moe.experts.down.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(
        NonFiniteLoss,
        match=r"gradient is not finite at step 2 \(first in gradient of layers\.1\.moe\.experts\[0\]\.down",
    ):
        stepper(model, learning_rate=1.0)(batch(), 2)


def test_bfloat16_keeps_weights_gradients_and_router_in_float32():
    model, text = language_model(), batch()
    exact = stepper(model, clip=0)(text, 1).loss
    step = stepper(model, clip=0)
    step.machine = choose_machine("cpu", "bfloat16", 1)
    result = step(text, 1)
    assert result.loss == pytest.approx(exact, rel=2e-2)
    assert result.loss != exact
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert step.log.decisions["layers.0.moe"][0].probs.dtype == torch.float32
