"""Small random layers, and the comparison of a layer with its slow twin: values, losses and gradients."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import compress

import torch
from oracles.experts import functions, split_bank
from oracles.papers import Answer
from torch import Tensor
from torch.testing import assert_close

import moestro
from moestro.routing import Context, Decision

ACTIVATIONS = ["swiglu", "geglu", "relu", "gelu", "silu", "squared_relu"]


@dataclass(frozen=True)
class Case:
    """Sizes and inputs of one random layer, all from one seed."""

    seed: int
    num_experts: int
    width: int
    hidden: int
    activation: str
    bias: bool
    x: Tensor  # [tokens, width]
    valid: Tensor | None  # [tokens]
    sequence: Tensor  # [tokens]

    @property
    def num_tokens(self) -> int:
        return len(self.x)

    @property
    def context(self) -> Context:
        return Context(valid=self.valid, sequence=self.sequence)

    @property
    def num_valid(self) -> int:
        return sum(self.valid_list)

    @property
    def valid_list(self) -> list[bool]:
        return [True] * self.num_tokens if self.valid is None else self.valid.tolist()


def random_case(seed: int, least_experts: int = 1, multiple: int = 1) -> Case:
    """1-7 experts (a multiple of `multiple`), widths 1-9, 0-13 tokens in up to 3 sequences, some padded."""
    dice, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    num_experts = dice.choice([e for e in range(least_experts, 8) if e % multiple == 0])
    width, num_tokens = dice.randint(1, 9), (seed * 5) % 14  # every number of tokens has its turn
    x = torch.randn(num_tokens, width, generator=generator, dtype=torch.float64)
    x = x.round() if seed % 5 == 4 else x  # with whole numbers in the router, scores tie
    sequence = torch.randint(0, 3, (num_tokens,), generator=generator)
    sequence = dice.choice([sequence, sequence.sort().values])
    valid = torch.rand(num_tokens, generator=generator) < dice.choice([0.5, 0.8])
    return Case(
        seed, num_experts, width, dice.randint(1, 5), dice.choice(ACTIVATIONS), dice.random() < 0.5, x,
        dice.choice([None, valid]), sequence,
    )  # fmt: skip


class Twin:
    """Float64 copies of a layer's parameters, to be differentiated on their own."""

    def __init__(self, layer: torch.nn.Module, activation: str):
        self.activation, self.layer = activation, layer
        self.copies = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
        self.names = {id(p): name for name, p in layer.named_parameters()}

    def __call__(self, parameter: Tensor) -> Tensor:
        return self.copies[self.names[id(parameter)]]

    @property
    def stacked(self) -> dict[str, Tensor]:
        return {name: self(p) for name, p in self.layer.experts.named_parameters()}

    @property
    def bank(self) -> list[dict[str, Tensor]]:
        return split_bank(self.stacked)

    @property
    def experts(self) -> list[Callable[[Tensor], Tensor]]:
        return functions(self.bank, self.activation)

    @property
    def shared(self) -> Callable[[Tensor], Tensor] | None:
        if self.layer.shared is None:
            return None
        weights = {name: self(p) for name, p in self.layer.shared.named_parameters()}
        return functions([weights], self.activation)[0]


def build(method: str, case: Case, **options: object) -> torch.nn.Module:
    """The method's layer for a case: float64, parameters drawn from the case's seed, every other one training."""
    layer = moestro.build(
        method, width=case.width, hidden=case.hidden, num_experts=case.num_experts, activation=case.activation,
        bias=case.bias, **options,
    )  # fmt: skip
    layer = randomise(layer, case.seed).train(case.seed % 2 == 1)
    if case.seed % 5 == 4 and hasattr(layer.router, "scorer"):
        for parameter in layer.router.scorer.parameters():
            parameter.data.round_()
    return layer


def randomise(layer: torch.nn.Module, seed: int, scale: float = 0.7) -> torch.nn.Module:
    """The layer in float64 with every parameter drawn anew (some methods start at zero)."""
    generator = torch.Generator().manual_seed(seed)
    layer = layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


def gradients(objective: Tensor, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradient by name; zero where the objective does not depend on an input."""
    if not objective.requires_grad:
        return {name: torch.zeros_like(value) for name, value in inputs.items()}
    found = torch.autograd.grad(objective, list(inputs.values()), allow_unused=True)
    return {
        name: torch.zeros_like(value) if grad is None else grad
        for (name, value), grad in zip(inputs.items(), found, strict=True)
    }


def objective(y: Tensor, losses: Mapping[str, Tensor]) -> Tensor:
    """A number that depends on every output and every loss, each in its own way."""
    probe = torch.linspace(-1, 1.5, max(y.numel(), 1), dtype=y.dtype)[: y.numel()].view(y.shape)
    out = (y * probe).sum()
    for n, name in enumerate(sorted(losses)):
        out = out + (0.5 + n) * losses[name]
    return out


def check_layer(
    layer: torch.nn.Module, case: Case, slow: Callable[[Twin, Tensor, Decision], Answer],
    context: Context | None = None, tolerance: float = 1e-12,
) -> Decision:  # fmt: skip
    """Assert that the layer and its slow twin agree: choices, kept, weights, y, losses, all gradients."""
    near = {"rtol": tolerance, "atol": tolerance}
    x, x_slow = case.x.clone().requires_grad_(), case.x.clone().requires_grad_()
    decision = layer.route(x, case.context if context is None else context)
    decision.routing.check()
    y = layer.run(x, decision)
    losses = {name: loss(decision) for name, (_, loss) in layer.losses.items()}
    twin = Twin(layer, case.activation)
    answer = slow(twin, x_slow, decision)

    if "choice" in decision.notes:
        choice, kept = decision.notes["choice"], decision.notes.get("kept")
        real = case.valid_list  # what padding would have chosen means nothing
        assert list(compress(choice.tolist(), real)) == list(compress(answer.choice, real))
        assert (choice >= 0 if kept is None else kept).tolist() == answer.kept
    assert_close(decision.routing.combine_matrix(), answer.combine.to(x.dtype), **near)
    assert_close(y, answer.y, **near)
    assert sorted(losses) == sorted(answer.losses)
    for name, value in answer.losses.items():
        assert_close(losses[name], value, msg=lambda m, name=name: f"loss {name}: {m}", **near)
    fast = gradients(objective(y, losses), {"x": x, **dict(layer.named_parameters())})
    honest = gradients(objective(answer.y, answer.losses), {"x": x_slow, **twin.copies})
    for name, value in honest.items():
        assert_close(fast[name], value, msg=lambda m, name=name: f"gradient of {name}: {m}", **near)
    return decision
