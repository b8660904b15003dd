"""However a batch is split, masked or padded, balancing does what it would do to one big batch."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from oracles.splits import BATCH, SPLITS, WIDTH, Tower, learn, micro_batches, samples
from torch import nn
from torch.testing import assert_close

import moestro
from moestro.balance import (
    AdaptiveLoss,
    AtTemperature,
    CommunicationBalance,
    Controller,
    DearExperts,
    FollowDrops,
    GlobalBatchBalance,
    GroupBalance,
    LoadTimesProbability,
    LoadWeightedL1,
    Locality,
    Loss,
    PerSequence,
    PlaceBalance,
    RoutingLog,
    SequenceBalance,
    TaskInformation,
    UnbiasedBalance,
    router_entropy,
    single_choice_balance,
    softmax_importance_cv_squared,
    z_loss,
)
from moestro.balance.information import token_information
from moestro.balance.localised import LocalisedBalance
from moestro.balance.losses import Importance
from moestro.balance.rebalance import LoadMemory
from moestro.balance.steps import WhenSparse
from moestro.experts import make_experts
from moestro.layers import MoE
from moestro.routers import Linear, TokenChoice, TopK, as_is, softmax
from moestro.routing import Context, Decision

EXPERTS = 4
# every loss that a plain token-choice router can have
LOSSES: dict[str, Loss] = {
    "switch": LoadTimesProbability("switch"),
    "megatron": LoadTimesProbability("megatron"),
    "transformers": LoadTimesProbability("transformers"),
    "unbiased": UnbiasedBalance(),
    "sequence": SequenceBalance(),
    "switch per sequence": PerSequence(LoadTimesProbability("switch")),
    "z": z_loss,
    "importance": Importance(),
    "importance, unbiased": Importance("unbiased"),
    "softmax importance": softmax_importance_cv_squared,
    "entropy": router_entropy,
    "l1": LoadWeightedL1(2),
    "prices": DearExperts((1.0, 2.0, 0.5, 3.0)),
    "temperature": AtTemperature(0.3),
    "groups": GroupBalance(2),
    "communication": CommunicationBalance(2, 1),
    "places": PlaceBalance(2),
    "global batch": GlobalBatchBalance(),
    "locality": Locality(2),
    "tasks": TaskInformation(2),
    "single": single_choice_balance,
    "localised": LocalisedBalance(0.3),
    "information": token_information,
    "adaptive": AdaptiveLoss(LoadTimesProbability("megatron"), start=0.3),
    "when sparse": WhenSparse(LoadTimesProbability("switch")),
}
# losses of particular routers come with their methods: name -> (method, options)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "shazeer-noisy-topk": ("shazeer-noisy-topk", {"top_k": 2}),
    "shazeer-hierarchical": ("shazeer-hierarchical", {"num_groups": 2, "groups_per_token": 1}),
    "v-moe": ("v-moe", {"capacity_factor": 4.0}),
    "dselect-k": ("dselect-k", {"entropy": 0.1}),
    "cmr": ("cmr", {"gate_dropout": 0.0}),
    "stablemoe": ("stablemoe", {"vocab_size": 11, "capacity_factor": 4.0}),
    "mixture-of-depths": ("mixture-of-depths", {}),
    "mole": ("mole", {}),
    "expert-gate": ("expert-gate", {}),
    "moe-plus-plus": ("moe-plus-plus", {}),
    "adaptive-gating": ("adaptive-gating", {}),
    "expert-choice": ("expert-choice", {"capacity_factor": 4.0, "predict": 0.1}),
    "hypermoe": ("hypermoe", {}),
}


def layer(loss: Loss, top_k: int = 2) -> MoE:
    router = TokenChoice(Linear(WIDTH, EXPERTS), TopK(top_k), softmax, as_is)
    return MoE(router, make_experts(EXPERTS, WIDTH, 3), losses={"loss": (0.7, copy.deepcopy(loss))})


def same_as_one_batch(make: Any, split: Any, layers: str = "sum") -> None:
    model = Tower(make)
    whole, whole_value, whole_state = learn(copy.deepcopy(model), [BATCH], layers)
    grads, value, state = learn(model, split, layers)
    assert_close(value, whole_value, rtol=1e-9, atol=1e-9)
    assert any(float(grad.abs().max()) > 1e-9 for grad in whole.values()), "the loss does nothing here"
    for name, grad in whole.items():
        assert_close(grads[name], grad, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
    for name, buffer in whole_state.items():
        assert_close(state[name], buffer, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("name", LOSSES)
def test_router_gradients_of_any_split_are_those_of_one_batch(name, split):
    top_k = 1 if name in ("single", "when sparse") else 2
    same_as_one_batch(partial(layer, LOSSES[name], top_k), split)


@pytest.mark.parametrize("layers", ["mean", "pooled"])
@pytest.mark.parametrize("name", ["megatron", "z", "importance", "information"])
def test_layers_averaged_or_pooled_are_as_exact(name, layers):
    same_as_one_batch(partial(layer, LOSSES[name]), SPLITS["ragged"], layers)


@pytest.mark.parametrize("name", METHODS)
def test_losses_of_particular_routers_are_exact_too(name, monkeypatch):
    """Their noise is fixed by the token, so that a split does not change it."""
    monkeypatch.setattr(torch, "randn_like", lambda z, **_: torch.sin(1e4 * z.detach()))
    method, options = METHODS[name]
    make = partial(moestro.build, method, width=WIDTH, hidden=3, num_experts=EXPERTS, **options)
    same_as_one_batch(make, SPLITS["ragged"])


def kinds_with_a_test() -> set[type]:
    """Kinds of loss that have a test above."""
    tested = {type(loss) for loss in LOSSES.values()}
    for method, options in METHODS.values():
        moe = moestro.build(method, width=WIDTH, hidden=3, num_experts=EXPERTS, **options)
        tested |= {type(loss) for _, loss in moe.losses.values()}
    return tested


def test_every_loss_is_tested():
    def below(kind: type) -> set[type]:
        return {kind}.union(*map(below, kind.__subclasses__()))

    ours = {kind for kind in below(Loss) if kind.__module__.startswith("moestro.balance.")}
    assert {kind for kind in ours if not kind.__abstractmethods__} - kinds_with_a_test() == set()


def test_every_loss_of_every_method_is_a_function_of_sums():
    """So that `statistics: step` works with all of them."""
    for name, method in moestro.all_methods().items():
        options = {"vocab_size": 11} if "vocab_size" in method.options else {}
        options |= {"num_domains": 2} if "num_domains" in method.options else {}
        moe = moestro.build(name, width=16, hidden=16, num_experts=16, **options)
        for title, (_, loss) in moe.losses.items():
            assert isinstance(loss, Loss), f"{name}: {title}"


CONTROLLERS: dict[str, Any] = {
    "loss-free bias": lambda: moestro.build(
        "deepseek-v3", width=WIDTH, hidden=3, num_experts=EXPERTS, top_k=2, bias_rate=0.1
    ),
    "quantile bias": lambda: moestro.build(
        "quantile-balancing", width=WIDTH, hidden=3, num_experts=EXPERTS, top_k=2
    ),
    "adaptive sparsity": lambda: moestro.build("remoe", width=WIDTH, hidden=3, num_experts=EXPERTS, top_k=1),
    "follow drops": lambda: following_layer(),
    "what experts carried": lambda: moestro.build("eigen-dmoe", width=WIDTH, hidden=3, num_experts=EXPERTS),
    "count steps": lambda: moestro.build(
        "stablemoe", width=WIDTH, hidden=3, num_experts=EXPERTS, vocab_size=11, capacity_factor=4.0
    ),
}


class OddTokensDropped:
    """A capacity by the token itself: which of its choices go does not depend on its neighbours."""

    batch_independent = True

    def causal(self, k: int) -> bool:
        return True

    causal_evaluation = causal

    def __call__(self, chosen: Any, weight: Any, num_experts: int, context: Context) -> Any:
        return chosen.restricted((weight.detach() * 1e4).long() % 3 > 0)


def following_layer() -> MoE:
    router = TokenChoice(Linear(WIDTH, EXPERTS), TopK(2), softmax, as_is, capacity=OddTokensDropped())
    losses = {"balance": (1.0, AdaptiveLoss(LoadTimesProbability("megatron"), start=0.01))}
    follow = FollowDrops("balance", gain=0.02, decay=0.5)
    return MoE(router, make_experts(EXPERTS, WIDTH, 3), losses=losses, controllers=[follow])


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("name", CONTROLLERS)
def test_controllers_do_the_same_after_any_split(name, split):
    model = Tower(CONTROLLERS[name])
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    _, _, whole = learn(copy.deepcopy(model), [BATCH])
    _, _, parts = learn(model, split)
    assert any(not torch.equal(before[name], whole[name]) for name in whole), "the controller does nothing here"
    for name, buffer in whole.items():
        assert_close(parts[name], buffer, rtol=1e-6, atol=1e-7)


def test_every_controller_is_tested():
    tested = {type(controller) for make in CONTROLLERS.values() for controller in make().controllers}
    ours = {kind for kind in Controller.__subclasses__() if kind.__module__.startswith("moestro.")}
    assert ours - tested == {LoadMemory}  # moves nothing: tests/train/test_placing.py


@pytest.mark.parametrize("name", ["megatron", "importance", "sequence", "locality"])
def test_float32_is_exact_to_a_millionth(name):
    def of(split: Any) -> dict[str, Any]:
        model = Tower(partial(layer, LOSSES[name])).float()
        log, passes = RoutingLog(model), micro_batches(model, split, torch.float32)
        totals = log.first_pass(passes)
        for run in passes:
            with log.recording():
                run()
            log.auxiliary_loss(totals).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    whole, parts = of([BATCH]), of(SPLITS["ragged"])
    for n, grad in whole.items():
        assert_close(parts[n], grad, rtol=1e-5, atol=1e-6)


def test_packing_changes_nothing():
    """Sequences one after another in one row, or each padded in a row of its own."""
    moe = layer(SequenceBalance()).double()
    x, valid, facts = samples()
    padded = moe.route(x.flatten(0, 1), Context(valid=valid.flatten(), sequence=facts["sequence"].flatten()))
    packed = moe.route(x[valid], Context(sequence=facts["sequence"][valid]))
    for name in ("sequence", "megatron", "z", "importance"):
        assert_close(LOSSES[name](packed), LOSSES[name](padded), rtol=1e-12, atol=1e-12)


def test_a_micro_batch_alone_is_not_exact():
    """What the first pass is for: without it the gradients of a nonlinear loss differ."""
    model = Tower(partial(layer, LOSSES["megatron"]))
    whole, _, _ = learn(copy.deepcopy(model), [BATCH])
    log, (x, valid, _) = RoutingLog(model), samples()
    tokens = int(valid.sum())
    for rows in (slice(0, 32), slice(32, 64)):
        with log.recording():
            model(x[rows], Context(valid=valid[rows].flatten()))
        (log.auxiliary_loss() * int(valid[rows].sum()) / tokens).backward()
    difference = (model.layers[0].router.scorer.weight.grad - whole["0.scorer.weight"]).abs().max()
    assert float(difference) > 1e-4


def test_the_first_pass_leaves_no_trace():
    moe = moestro.build("eigen-dmoe", width=WIDTH, hidden=3, num_experts=EXPERTS).train()
    moe.router.register_buffer("met", torch.zeros(()))  # a router that remembers what it met
    moe.router.register_forward_hook(lambda router, given, decision: router.met.add_(len(given[0])) and None)
    noisy = moestro.build("deepseek-v3", width=WIDTH, hidden=3, num_experts=EXPERTS, top_k=2, bias_rate=0.1)
    model = nn.Sequential(moe, noisy)
    log, x = RoutingLog(model), torch.randn(3, WIDTH)
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    drawn = torch.randn(3)
    torch.manual_seed(5)
    log.first_pass([lambda: (model(x), torch.randn(7))])
    assert torch.equal(torch.randn(3), drawn)
    log.update_controllers()
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    with pytest.raises(ValueError, match="nothing was recorded"):
        log.auxiliary_loss()


def test_a_plain_function_cannot_be_added_up():
    def half(decision: Decision) -> torch.Tensor:
        return decision.probs.mean() / 2

    router = TokenChoice(Linear(WIDTH, EXPERTS), TopK(1), softmax, as_is)
    moe = MoE(router, make_experts(EXPERTS, WIDTH, 3), losses={"half": (1.0, half)})
    log, x = RoutingLog(moe), torch.randn(3, WIDTH)
    with log.recording():
        moe(x)
    assert float(log.auxiliary_loss().detach()) == pytest.approx(1 / EXPERTS / 2)
    with pytest.raises(ValueError, match="'half' is a function of one Decision"):
        log.first_pass([lambda: moe(x)])
    with pytest.raises(ValueError, match="must be sum, mean or pooled"):
        RoutingLog(moe, layers="median")


def test_totals_of_other_micro_batches_are_refused():
    moe = layer(z_loss)
    log, x = RoutingLog(moe), torch.randn(3, WIDTH)
    totals = log.first_pass([lambda: moe(x)])
    with log.recording():
        moe(x)
        moe(x)
    with pytest.raises(ValueError, match="run the same micro-batches twice"):
        log.auxiliary_loss(totals)
