"""Controllers measure decisions in their own way; stateful losses are saved with the layer."""

import torch
from torch import Tensor, nn
from torch.testing import assert_close

import moestro
from moestro.balance import Controller, RoutingLog
from moestro.experts import make_experts
from moestro.layers import MoE
from moestro.routers import Linear, TokenChoice, TopK, as_is, softmax
from moestro.routing import Decision


class Tokens(Controller):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def measure(self, decision: Decision) -> Tensor:
        return torch.tensor([len(decision.probs)])

    def update(self, moe: MoE, measured: Tensor) -> None:
        self.seen.append(float(self.summed(measured)))


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, decision: Decision) -> Tensor:
        return self.scale * decision.probs.sum()


def layer() -> MoE:
    router = TokenChoice(Linear(4, 3), TopK(1), softmax, as_is)
    return MoE(router, make_experts(3, 4, 5), losses={"size": (1.0, Stateful())}, controllers=[Tokens()])


def test_each_controller_gets_the_sum_of_its_own_measure() -> None:
    moe = layer()
    log = RoutingLog(moe)
    for tokens in (3, 5):
        with log.recording():
            moe(torch.randn(tokens, 4))
    log.update_controllers()
    log.update_controllers()
    assert moe.controllers[0].seen == [8.0]


def test_a_loss_with_a_state_is_part_of_the_layer() -> None:
    moe, again = layer(), layer()
    moe.losses["size"][1].scale.fill_(7.0)
    again.load_state_dict(moe.state_dict())
    assert_close(again.losses["size"][1].scale, torch.tensor(7.0))


def test_a_noted_weight_scales_the_shared_expert() -> None:
    moe = moestro.build("deepseek-v3", width=4, hidden=5, num_experts=3, top_k=1)
    x = torch.randn(2, 4)
    decision = moe.route(x)
    alone = moe.shared(x)
    routed = moe.run(x, decision) - alone
    weighted = Decision(decision.routing, notes={"shared_weight": torch.tensor([0.25, 2.0])})
    assert_close(moe.run(x, weighted), routed + alone * torch.tensor([[0.25], [2.0]]))
