"""A bad number is caught before the optimiser step, and the module that made it is named."""

import random

import pytest
import torch
from oracles.tiny_run import tiny_recipe
from torch import nn

import moestro
from moestro.cli import main
from moestro.data import Batch
from moestro.experts import Experts
from moestro.train import NonFiniteLoss, train_run
from moestro.train.culprit import Culprit, Watch
from moestro.train.files import read_lines
from moestro.train.machine import choose_machine
from moestro.train.optimiser import build_optimiser
from moestro.train.progress import Silent
from moestro.train.spikes import spike
from moestro.train.step import Stepper


def fresh(seed, check_every=1):
    model = moestro.build_language_model(
        vocab_size=16,
        width=8,
        num_layers=2,
        num_heads=2,
        method=["mixtral", "deepseek-v3"][seed // 8 % 2],
        options={"top_k": 2},
        num_experts=4,
        expert_hidden=8,
        seed=seed,
    )
    optimiser = build_optimiser(model, learning_rate=0.01, weight_decay=0.1, betas=(0.9, 0.95))
    log = moestro.RoutingLog(model)
    machine = choose_machine("cpu", "float32", 1)
    return model, optimiser, log, Stepper(model, optimiser, machine, log, check_every=check_every)


def batch(seed):
    tokens = torch.randint(16, (4, 9), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.zeros(4, 8, dtype=torch.uint8), 32)


class Poison(torch.autograd.Function):
    """The identity, whose gradient is bad."""

    @staticmethod
    def forward(ctx, x, value):
        ctx.value = value
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return torch.full_like(gradient, ctx.value), None


def plant(kind, chance, model, optimiser):
    """Make one number bad; the start of the name that the guard must give, and what it must call it."""
    value = chance.choice([float("nan"), float("inf"), float("-inf")])
    names = dict(model.named_parameters())
    if kind in ("weight", "optimiser state", "gradient of a parameter"):
        name = chance.choice(sorted(names))
        parameter = names[name]
        where = chance.randrange(parameter.numel())
        expected = name
        owner = model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, Experts) and parameter.ndim == 3:
            expert = where // parameter[0].numel()
            expected = f"{name.rpartition('.')[0]}[{expert}].{name.rpartition('.')[2]}"
        if kind == "weight":
            parameter.data.view(-1)[where] = value
            return expected, "weight"
        if kind == "optimiser state":
            key = chance.choice(["exp_avg", "exp_avg_sq"])
            optimiser.state[parameter][key].view(-1)[where] = value
            return f"{expected}, {key}", "optimiser state"
        parameter.register_hook(lambda g: g.flatten().index_fill(0, torch.tensor([where]), value).view_as(g))
        return expected, "gradient"
    modules = {name: m for name, m in model.named_modules() if not isinstance(m, nn.ModuleList)}
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    routers = [f"layers.{i}.moe.router.scorer" for i in range(2)]
    if kind == "input":
        name = chance.choice([name for name in linear if name != "head"])
        modules[name].register_forward_pre_hook(lambda m, given: (given[0] * value, *given[1:]))
        return name, "input"
    if kind == "output":
        name = chance.choice(linear)
        modules[name].register_forward_hook(lambda m, given, output: output + value)
        return name, "output"
    if kind == "router logits":
        name = chance.choice(routers)
        modules[name].register_forward_hook(lambda m, given, output: output * float("nan"))
        return name, "output"
    if kind == "auxiliary loss":
        layer = chance.randrange(2)
        moe = model.layers[layer].moe
        moe.losses["planted"] = (1.0, lambda decision: decision.probs.sum() * value)
        return f"layers.{layer}.moe: planted", "auxiliary loss"
    name = chance.choice([name for name in linear if name != "head"])
    modules[name].register_forward_hook(lambda m, given, output: Poison.apply(output, value))
    return name, "gradient"


KINDS = (
    "weight",
    "optimiser state",
    "input",
    "output",
    "router logits",
    "auxiliary loss",
    "gradient of a parameter",
    "gradient of a module",
)


@pytest.mark.parametrize("check_every", [1, 8])  # weights that a step uses show in it, whether looked at or not
@pytest.mark.parametrize("count", [24, pytest.param(200, marks=pytest.mark.nightly)])
def test_what_was_planted_is_caught_before_the_step_and_named(count, check_every):
    for trial in range(count):
        chance, kind = random.Random(trial), KINDS[trial % len(KINDS)]
        model, optimiser, log, stepper = fresh(trial, check_every)
        stepper(batch(trial), 1)
        expected, called = plant(kind, chance, model, optimiser)
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(NonFiniteLoss) as caught:
            stepper(batch(trial + 1), 2)
        assert caught.value.name.startswith(expected), (trial, kind, expected, str(caught.value))
        assert caught.value.kind == called, (trial, kind, str(caught.value))
        pairs = zip(before, model.parameters(), strict=True)
        assert all(torch.equal(old.nan_to_num(7), new.nan_to_num(7)) for old, new in pairs)
        log.close()


def test_a_bad_bias_is_caught_where_no_loss_shows_it_and_a_mask_is_no_fault():
    model, _, _, stepper = fresh(8)
    model.layers[1].moe.router.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    stepper = Stepper(model, stepper.optimiser, stepper.machine, stepper.log)
    stepper(batch(0), 1)
    bias = model.layers[1].moe.router.select.bias
    bias[2] = float("-inf")  # that expert is never chosen
    with pytest.raises(NonFiniteLoss) as caught:
        stepper(batch(1), 2)
    assert (caught.value.kind, caught.value.name) == ("weight", "layers.1.moe.router.select.bias")
    bias[2] = 0.0
    stepper(batch(1), 2)


def test_the_watch_leaves_no_hook_behind():
    model, _, _, stepper = fresh(2)
    stepper(batch(0), 1)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    model.embedding.weight.data[3] = float("nan")
    with pytest.raises(NonFiniteLoss):
        stepper(batch(1), 2)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    model.embedding.weight.data[3] = 0.0
    stepper(batch(1), 2)


def test_controllers_forget_a_step_that_is_not_taken():
    model, _, log, stepper = fresh(8)
    model.embedding.weight.data[3] = float("nan")
    with pytest.raises(NonFiniteLoss):
        stepper(batch(1), 1)
    bias = model.layers[0].moe.router.select.bias
    log.update_controllers()
    assert not bias.any()
    model.embedding.weight.data[3] = 0.0
    stepper(batch(1), 1)
    assert bias.any()


class ZeroRoot(nn.Module):
    """Finite forwards; backwards 0 times infinity."""

    def forward(self, x):
        return x + (0 * x).abs().sqrt()


def test_the_module_that_makes_a_bad_gradient_is_named_not_the_one_before_it():
    model = nn.Sequential(nn.Linear(3, 3), ZeroRoot(), nn.Linear(3, 1))
    with Watch(model) as watch:
        model(torch.randn(2, 3)).sum().backward()
    assert watch.forward is None
    assert watch.backward == Culprit("gradient", "1")


class Planting(Silent):
    """Plants a bad weight before a step, once."""

    def __init__(self, step, monkeypatch, lasting=False):
        self.lines, self.step_number = [], step
        original = Stepper.__call__

        def call(stepper, given, step):
            if step == self.step_number and (lasting or not any("left out" in line for line in self.lines)):
                stepper.model.layers[0].moe.experts.down.data[2, 0, 0] = float("nan")
            return original(stepper, given, step)

        monkeypatch.setattr(Stepper, "__call__", call)

    def say(self, line):
        self.lines.append(line)


def test_halt_keeps_the_step_and_replay_runs_it_alone(tmp_path, monkeypatch, capsys):
    recipe, out = tiny_recipe(tmp_path / "text.txt"), tmp_path / "run"
    with pytest.raises(
        NonFiniteLoss, match=r"layers\.0\.moe\.experts\[2\]\.down.*; the step is kept: moestro replay"
    ):
        train_run(recipe, out, progress=Planting(4, monkeypatch))
    monkeypatch.undo()
    monkeypatch.setenv("MOESTRO_CACHE", str(tmp_path / "cache"))
    assert main(["replay", str(out / "repro")]) == 1
    then, now = capsys.readouterr().out.splitlines()
    assert then.startswith("then: ")
    assert "at step 4 (first in weight of layers.0.moe.experts[2].down)" in now
    assert main(["replay", str(out)]) == 2
    assert "holds no kept step" in capsys.readouterr().err


def test_rollback_goes_back_to_the_last_checkpoint_and_leaves_the_batch_out(tmp_path, monkeypatch):
    watcher = Planting(5, monkeypatch)
    recipe = tiny_recipe(tmp_path / "text.txt", steps=8, checkpoint_every=2, on_non_finite="rollback")
    result = train_run(recipe, tmp_path / "run", progress=watcher)
    assert "moe: back to step 4" in watcher.lines
    assert [record["step"] for record in read_lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 6, 7, 8]
    events = read_lines(tmp_path / "run" / "events.jsonl")
    assert [(event["step"], event["policy"]) for event in events] == [(5, "rollback")]
    assert result["validation_bits_per_byte"] < 9


def test_skip_leaves_the_batch_out_and_a_fault_that_stays_ends_the_run(tmp_path, monkeypatch):
    watcher = Planting(3, monkeypatch, lasting=True)
    recipe = tiny_recipe(tmp_path / "text.txt", steps=40, evaluate_every=50, on_non_finite="skip")
    with pytest.raises(NonFiniteLoss, match=r"one of 11 in 100 steps, which skip does not mend"):
        train_run(recipe, tmp_path / "run", progress=watcher)
    assert sum("skip: the batch is left out" in line for line in watcher.lines) == 10


def test_a_validation_loss_that_is_no_number_ends_the_run(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path / "text.txt", steps=40, evaluate_every=3, on_non_finite="skip")
    with pytest.raises(NonFiniteLoss, match="the validation loss is nan after step 3"):
        train_run(recipe, tmp_path / "run", progress=Planting(3, monkeypatch, lasting=True))


def test_rollback_without_a_checkpoint_says_so(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path / "text.txt", on_non_finite="rollback")
    with pytest.raises(NonFiniteLoss, match=r"no checkpoint to go back to: lower train\.checkpoint_every"):
        train_run(recipe, tmp_path / "run", progress=Planting(3, monkeypatch))


def test_a_spike_is_six_deviations_above_fifty_losses():
    steady = [2.0 + 0.1 * (-1) ** i for i in range(60)]
    assert spike(steady, 2.5) is None
    assert spike(steady, 2.7) == pytest.approx(7.0)
    assert spike(steady[:19], 99.0) is None
    assert spike([9.0] * 50 + steady[:50], 2.7) == pytest.approx(7.0)


def test_huge_weights_are_sound_and_one_infinite_number_is_not():
    model, optimiser, _, stepper = fresh(3)
    stepper(batch(3), 1)
    model.head.weight.data.fill_(3e38)  # their square overflows
    assert stepper.sound(2)
    model.to(torch.float16)
    model.head.weight.data.fill_(6e4)
    assert stepper.sound(2)
    moments = optimiser.state[model.layers[1].moe.experts.down]["exp_avg_sq"]
    moments.view(-1)[-1] = float("inf")
    assert not stepper.sound(2)
    moments.view(-1)[-2] = float("-inf")  # the two do not cancel
    assert not stepper.sound(2)


def test_state_is_looked_at_every_step_and_each_weight_once_in_eight():
    model, optimiser, _, stepper = fresh(3, check_every=8)
    stepper(batch(3), 1)
    for parameter in model.parameters():
        kept = parameter.detach().clone()
        parameter.data.view(-1)[-1] = float("nan")
        assert sum(not stepper.sound(step) for step in range(16, 24)) == 1
        parameter.data.copy_(kept)
        for moments in [value for value in optimiser.state[parameter].values() if value.ndim]:
            moments.view(-1)[-1] = float("nan")
            assert not any(stepper.sound(step) for step in range(16, 24))
            moments.view(-1)[-1] = 0.0
    assert all(stepper.sound(step) for step in range(16, 24))
    model.embedding.weight.data[3] = float("nan")
    assert all(Stepper(model, optimiser, stepper.machine, check_every=0).sound(step) for step in range(8))


def test_an_expert_that_no_token_meets_is_found_bad_within_eight_steps_and_harms_nothing_before():
    model, _, _, stepper = fresh(8, check_every=8)
    router, experts = model.layers[0].moe.router, model.layers[0].moe.experts
    experts.down.data[3] = float("nan")

    def eight_steps():
        for step in range(1, 9):
            router.select.bias[3] = -100.0
            assert stepper(batch(step), step).loss < 10

    with pytest.raises(NonFiniteLoss) as caught:
        eight_steps()
    assert (caught.value.kind, caught.value.name) == ("weight", "layers.0.moe.experts[3].down")
    assert router.select.bias[3] == -100.0
    assert all(parameter.isfinite().all() for name, parameter in model.named_parameters() if "down" not in name)
