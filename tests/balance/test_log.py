"""The log records from outside, once, and hands losses and loads on exactly."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import moestro
from moestro.balance import LossFreeBias, RoutingLog
from moestro.balance.loss import added
from moestro.layers import MoE
from moestro.routers import Linear, TokenChoice, TopK, as_is, softmax


class Stack(nn.Module):
    """Two MoE layers with residuals, optionally recomputed in the backward pass."""

    def __init__(self, method: str, recompute: bool = False, **options: object) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            moestro.build(method, width=6, hidden=4, num_experts=4, **options) for _ in range(2)
        )
        self.recompute = recompute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x))
        return x


def test_auxiliary_loss_is_the_sum_over_layers() -> None:
    model = Stack("mixtral", balance=0.5)
    log = RoutingLog(model)
    assert log.layers == ["layers.0", "layers.1"]
    with log.recording():
        model(torch.randn(10, 6))
    decisions = [log.decisions[name][0] for name in log.layers]
    loss = model.layers[0].losses["balance"][1]
    assert_close(log.auxiliary_loss(), 0.5 * (loss(decisions[0]) + loss(decisions[1])))
    assert_close(log.losses()["balance"], (loss(decisions[0]) + loss(decisions[1])).detach() / 2)


def test_layers_are_summed_averaged_or_pooled() -> None:
    model = Stack("mixtral", balance=0.5)
    loss, x = model.layers[0].losses["balance"][1], torch.randn(10, 6)
    value = {}
    for layers in ("sum", "mean", "pooled"):
        log = RoutingLog(model, layers=layers)
        with log.recording():
            model(x)
        value[layers] = log.auxiliary_loss().detach()
        decisions = [log.decisions[name][0] for name in log.layers]
        log.close()
    assert_close(value["mean"], value["sum"] / 2)
    both = added(loss.sums(decision) for decision in decisions)
    assert_close(value["pooled"], 0.5 * loss.value(both).detach())
    assert float((value["pooled"] - value["mean"]).abs()) > 1e-6


def test_only_what_runs_inside_is_recorded_and_each_recording_is_fresh() -> None:
    model = Stack("mixtral")
    log = RoutingLog(model)
    x = torch.randn(3, 6)
    model(x)
    with pytest.raises(ValueError, match="nothing was recorded"):
        log.auxiliary_loss()
    for _ in range(2):
        with log.recording():
            model(x)
        model(x)
        assert [len(each) for each in log.decisions.values()] == [1, 1]
    log.close()
    with log.recording():
        model(x)
    assert [len(each) for each in log.decisions.values()] == [0, 0]


def test_a_shared_layer_is_recorded_at_every_call() -> None:
    moe = moestro.build("mixtral", width=6, hidden=4, num_experts=4, balance=1.0)
    log = RoutingLog(moe)
    x = torch.randn(5, 6)
    with log.recording():
        moe(moe(x))
    assert len(log.decisions[""]) == 2


def test_recomputation_does_not_count_twice() -> None:
    torch.manual_seed(0)
    plain = Stack("deepseek-v3", top_k=2, bias_rate=0.1)
    again = Stack("deepseek-v3", recompute=True, top_k=2, bias_rate=0.1)
    again.load_state_dict(plain.state_dict())
    x = torch.randn(9, 6)
    for model in (plain, again):
        log = RoutingLog(model)
        with log.recording():
            y = model(x)
        (y.square().sum() + log.auxiliary_loss()).backward()
        assert [len(each) for each in log.decisions.values()] == [1, 1]
        log.update_controllers()
    for p, q in zip(plain.parameters(), again.parameters(), strict=True):
        assert_close(p.grad, q.grad)
    assert torch.equal(plain.layers[1].router.select.bias, again.layers[1].router.select.bias)


def test_the_bias_moves_by_the_sign_of_the_whole_steps_load() -> None:
    moe = moestro.build("deepseek-v3", width=6, hidden=4, num_experts=4, top_k=1, bias_rate=0.01)
    log = RoutingLog(moe)
    total = torch.zeros(4, dtype=torch.long)
    for _ in range(3):  # micro-batches of one step
        with log.recording():
            moe(torch.randn(7, 6))
        total += log.decisions[""][0].routing.load()
    log.update_controllers()
    assert_close(moe.router.select.bias, 0.01 * torch.sign(total.float().mean() - total))
    before = moe.router.select.bias.clone()
    log.update_controllers()  # nothing new was recorded
    moe.eval()
    with log.recording():
        moe(torch.randn(7, 6))
    log.update_controllers()  # evaluation does not balance
    assert torch.equal(moe.router.select.bias, before)


def test_the_bias_evens_out_the_load_of_a_fixed_router() -> None:
    moe = moestro.build("deepseek-v3", width=6, hidden=4, num_experts=4, top_k=1, bias_rate=0.002)
    with torch.no_grad():
        moe.router.scorer.weight.normal_(0, 0.5)
        moe.router.scorer.weight[0] += 0.8
    log, x = RoutingLog(moe), torch.randn(4000, 6) + 1
    first = moe.route(x).routing.load().max() / 1000
    for _ in range(300):
        with log.recording():
            moe.route(x)
        log.update_controllers()
    last = moe.route(x).routing.load().max() / 1000
    assert first > 2.5
    assert last < 1.1  # 1 + O(rate)


def test_attach_adds_the_same_gradient_without_changing_the_output() -> None:
    gradients = []
    for attached in (False, True):
        torch.manual_seed(0)
        model = Stack("mixtral", balance=0.3)
        log = RoutingLog(model)
        with log.recording():
            y = model(torch.randn(8, 6))
        if attached:
            assert torch.equal(log.attach(y), y)
            log.attach(y).square().sum().backward()
        else:
            (y.square().sum() + log.auxiliary_loss()).backward()
        gradients.append([p.grad for p in model.parameters()])
    for p, q in zip(*gradients, strict=True):
        assert_close(p, q)


def test_describe_says_what_acts_and_what_is_off() -> None:
    lines = RoutingLog(Stack("mixtral", balance=0.0)).describe()
    assert lines == ["mixtral: balance loss off (2 layers: layers.0 to layers.1)"]
    assert "LossFreeBias(rate=0.001)" in RoutingLog(Stack("deepseek-v3", top_k=2)).describe()[0]
    assert "no balancing" in RoutingLog(Stack("expert-choice")).describe()[0]


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match="no MoE layer to record"):
        RoutingLog(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="must not be negative"):
        LossFreeBias(-1.0)
    with pytest.raises(ValueError, match="needs a router whose select slot is a BiasedSelection"):
        MoE(
            TokenChoice(Linear(6, 4), TopK(1), softmax, as_is),
            moestro.build("mixtral", width=6, hidden=4, num_experts=4).experts,
            controllers=[LossFreeBias()],
        )


def test_a_model_without_losses_has_an_auxiliary_loss_of_zero() -> None:
    moe = moestro.build("expert-choice", width=6, hidden=4, num_experts=4)
    log = RoutingLog(moe)
    with log.recording():
        moe(torch.randn(5, 6))
    assert log.auxiliary_loss() == 0
    assert log.losses() == {}
