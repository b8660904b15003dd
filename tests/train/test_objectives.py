"""What models of unusual routers are trained for, against the formulas."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

import moestro
from moestro.data import Batch
from moestro.train.machine import choose_machine
from moestro.train.objectives import NextToken, PolicyGradient, TwoPasses, objective_for
from moestro.train.step import Stepper

MACHINE = choose_machine("cpu", "float32", 1)


def batch(size=4, length=6):
    tokens = torch.randint(16, (size, length + 1))
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.zeros(size, length, dtype=torch.uint8), size * length)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def language_model(method, num_experts=4, **options):
    sizes = {"vocab_size": 16, "width": 8, "num_layers": 2, "num_heads": 2, "expert_hidden": 8, "seed": 0}
    model = moestro.build_language_model(method=method, options=options, num_experts=num_experts, **sizes)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    return model


def step(model, text, **options):
    optimiser = torch.optim.SGD(model.parameters(), lr=0.0)
    return Stepper(model, optimiser, MACHINE, moestro.RoutingLog(model), clip=0, **options)(text, 1)


@pytest.mark.parametrize(
    ("method", "objective"), [("thor", TwoPasses), ("rl-router", PolicyGradient), ("mixtral", NextToken)]
)
def test_the_routers_say_what_a_model_is_trained_for(method, objective):
    assert type(objective_for(language_model(method))) is objective


def test_thor_learns_from_two_passes_that_are_pulled_together():
    model, text = language_model("thor"), batch()
    torch.manual_seed(7)
    result = step(model, text, objective=TwoPasses(alpha=3.0))
    ours = gradients(model)
    model.zero_grad()
    torch.manual_seed(7)
    p, q = (model(text.tokens).flatten(0, 1) for _ in range(2))
    targets = text.targets.flatten()
    entropies = [F.cross_entropy(each, targets) for each in (p, q)]
    kl = F.kl_div(q.log_softmax(1), p.softmax(1), reduction="batchmean")
    kl = kl + F.kl_div(p.log_softmax(1), q.softmax(1), reduction="batchmean")
    assert float(kl.detach()) > 1e-3, "both passes drew the same experts"
    (sum(entropies) + 3.0 / 2 * kl).backward()
    assert_close(ours, gradients(model), rtol=1e-4, atol=1e-6)
    assert result.loss == pytest.approx(float(sum(entropies).detach()) / 2, rel=1e-5)


def test_rl_router_is_rewarded_token_by_token():
    model, text = language_model("rl-router", weight="one"), batch()
    torch.manual_seed(7)
    result = step(model, text, objective=PolicyGradient(entropy=0.2))
    ours = gradients(model)
    model.zero_grad()
    torch.manual_seed(7)
    log = moestro.RoutingLog(model)
    with log.recording():
        logits = model(text.tokens)
    each = F.cross_entropy(logits.flatten(0, 1), text.targets.flatten(), reduction="none")
    objective = each.mean()
    for (decision,) in log.decisions.values():
        value, policy = decision.notes["value"], decision.logits.log_softmax(1)
        for t, reward in enumerate((-each).detach()):
            acted = policy[t, decision.notes["choice"][t, 0]]
            error = (value[t] - reward).abs()
            huber = 0.5 * error**2 if float(error.detach()) < 1 else error - 0.5
            bonus = 0.2 * (policy[t].exp() * policy[t]).sum()
            objective = objective + (huber + bonus - (reward - value[t]).detach() * acted) / len(each)
    objective.backward()
    assert_close(ours, gradients(model), rtol=1e-4, atol=1e-6)
    assert result.loss == pytest.approx(float(each.detach().mean()), rel=1e-5)
    assert float(ours["layers.0.moe.router.scorer.weight"].abs().max()) > 0


@pytest.mark.parametrize(
    ("method", "num_experts", "options"), [("rl-router", 1, {"weight": "one"}), ("mixtral", 4, {"balance": 0.0})]
)
def test_objectives_add_up_over_micro_batches(method, num_experts, options):
    """A policy of one expert: draws of several differ between one batch and two halves."""
    torch.manual_seed(3)
    text = batch(4)
    whole, split = (language_model(method, num_experts, **options) for _ in range(2))
    a, b = step(whole, text), step(split, text, accumulate=2)
    assert b.loss == pytest.approx(a.loss, rel=1e-6)
    assert_close(gradients(split), gradients(whole), rtol=1e-5, atol=1e-6)


def test_bad_objectives_are_refused():
    with pytest.raises(ValueError, match="alpha=-1"):
        TwoPasses(-1)
    mixed = torch.nn.ModuleList([language_model("thor"), language_model("mixtral")])
    with pytest.raises(ValueError, match="different objectives: next-token, two-passes"):
        objective_for(mixed)
