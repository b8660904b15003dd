"""Checks of the catalogue: expert-gate."""

import pytest
import torch
from torch.testing import assert_close

from moestro.balance import RoutingLog
from moestro.layers import MoE
from moestro.mixtures.torch import ExpertGate
from moestro.mixtures.torch.expert_gate import distillation_loss
from moestro.routers.autoencoders import relatedness


def subspace(seed, rows=240, width=50, size=5):
    """A task in a random subspace, two classes by a plane in it; another draw of rows for every call."""
    basis = torch.randn(size, width, generator=torch.Generator().manual_seed(seed))
    code = torch.randn(rows, size)
    return code @ basis, (code[:, 0] > 0).long()


@pytest.fixture(scope="module")
def learned():
    torch.manual_seed(0)
    gate = ExpertGate(50, code=25)
    for task in range(3):
        gate.add_task(*subspace(task), epochs=60, batch=40)
    return gate


def test_expert_gate_knows_three_tasks_in_subspaces(learned):
    torch.manual_seed(1)
    for task in range(3):
        x, y = subspace(task)
        found, label = learned.predict(x)
        assert (found == task).float().mean() > 0.95
        assert (label == y)[found == task].float().mean() > 0.9
        assert learned(x).shape == (240, 6)
        assert (learned(x).isfinite().sum(1) == 2).all()


def test_expert_gate_chooses_the_least_error_at_every_temperature(learned):
    x = torch.cat([subspace(task)[0] for task in range(3)])
    least = learned.gate.errors(x).argmin(1)
    kept = learned.gate.temperature
    for temperature in (1e-5, 0.1, 2.0, 100.0):
        learned.gate.temperature = temperature * 50
        assert torch.equal(learned.predict_task(x), least)
        proba = learned.task_proba(x)
        if temperature == 1e-5:
            assert_close(proba, torch.nn.functional.one_hot(least, 3).float(), atol=1e-2, rtol=0)
        if temperature == 100:
            assert_close(proba, torch.full_like(proba, 1 / 3), atol=1e-2, rtol=0)
    learned.gate.temperature = kept


def test_expert_gate_errors_are_means_over_the_features(learned):
    """Else the softmax of the errors at temperature 2 is saturated by their number."""
    x = subspace(0)[0]
    logits = learned.layer.route(x).logits
    assert_close(logits, -learned.gate.errors(x) / 50 / 2.0)
    assert 0.3 < learned.task_proba(x).max(1).values.mean().item() < 0.9


def test_expert_gate_relatedness_of_a_task_with_itself_is_one():
    error = torch.tensor(0.37)
    assert_close(relatedness(error, error), torch.tensor(1.0))
    torch.manual_seed(2)
    gate = ExpertGate(50, code=25)
    held = subspace(0)
    gate.add_task(*subspace(0), held, epochs=60, batch=40)
    again = gate.add_task(*subspace(0), held, epochs=60, batch=40)
    other = gate.add_task(*subspace(1), epochs=60, batch=40)
    assert again.relatedness[0] > 0.85
    assert (again.source, again.transfer) == (0, "lwf")
    assert max(other.relatedness) < 0.85
    assert other.transfer == "fine-tune"
    assert gate.tasks[0].transfer == "scratch"


def test_expert_gate_adding_a_task_leaves_the_others_as_they_are():
    torch.manual_seed(3)
    gate = ExpertGate(50, code=25)
    x = subspace(0)[0]
    gate.add_task(*subspace(0), epochs=10)
    errors, answers = gate.gate.errors(x), gate.experts[0](x)
    gate.add_task(*subspace(1), epochs=10)
    gate.add_task(*subspace(0), epochs=10)
    assert torch.equal(gate.gate.errors(x)[:, 0], errors[:, 0]) or torch.allclose(
        gate.gate.errors(x)[:, 0], errors[:, 0], rtol=1e-6
    )
    assert torch.equal(gate.experts[0](x), answers)


def test_expert_gate_without_distillation_is_fine_tuning():
    """λ = 0 and a task that is not related lead to the same network; λ = 1 leads to another."""
    networks = {}
    for name, options in {
        "off": {"distillation": 0.0},
        "fine-tune": {"threshold": float("inf")},
        "on": {"distillation": 1.0},
    }.items():
        torch.manual_seed(4)
        gate = ExpertGate(50, code=25, **options)
        first, second = subspace(0), subspace(0)
        gate.add_task(*first, epochs=30)
        gate.add_task(second[0], 1 - second[1], epochs=30)  # other labels on the same inputs
        networks[name] = gate.experts[1].state_dict()
    for key, value in networks["off"].items():
        assert torch.equal(value, networks["fine-tune"][key])
        assert key == "head.bias" or not torch.equal(value, networks["on"][key])
    logits = torch.tensor([[2.0, 0.0]])
    expected = -4 * (logits / 2).softmax(1) @ (logits / 2).log_softmax(1).T
    assert_close(distillation_loss(logits, logits), expected.squeeze())


def test_expert_gate_is_a_moe_layer(learned):
    x = torch.cat([subspace(task)[0] for task in range(3)])
    layer = learned.layer
    assert isinstance(layer, MoE)
    log = RoutingLog(layer)
    with log.recording():
        layer(x)
    assert log.decisions[""][0].routing.load().sum() == 720
    assert torch.equal(log.decisions[""][0].notes["choice"][:, 0], learned.predict_task(x))


def test_expert_gate_refuses_what_it_cannot_use():
    gate = ExpertGate(5)
    with pytest.raises(ValueError, match=r"no task yet; call add_task\(x, y\) first"):
        gate(torch.randn(2, 5))
    with pytest.raises(ValueError, match="pass x \\[rows, 5\\]"):
        gate.add_task(torch.randn(3, 4), torch.zeros(3).long())
    with pytest.raises(ValueError, match="temperature=0"):
        ExpertGate(5, temperature=0)
