"""A fused bank's backward adds to gradients that are there: as autograd would, and only where it alone is asked."""

from collections.abc import Callable

import pytest
import torch
from kernels.test_bank import arguments
from oracles.operators import Calls
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from moestro.experts import Experts, accumulate_in_place, make_experts
from moestro.kernels import matrices
from moestro.kernels.arguments import PARAMETERS
from moestro.kernels.bank import bank_backward_into
from moestro.routing import SparseRouting

WIDTH, EXPERTS = 48, 6


def a_bank(hidden: int = 24, activation: str = "swiglu", bias: bool = False) -> Experts:
    torch.manual_seed(3)
    experts = make_experts(EXPERTS, WIDTH, hidden, activation, bias)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, 0, 0.2)
    return experts


def micro_batch(experts: Experts, number: int) -> Tensor:
    """A loss of other tokens and other choices each time; the last expert is never chosen in the second."""
    tokens, noise = 70, torch.Generator().manual_seed(number)
    ways = EXPERTS - (number == 1)
    index = torch.rand(tokens, ways, generator=noise).topk(2).indices
    weight = torch.rand(tokens, 2, generator=noise)
    x = torch.randn(tokens, WIDTH, generator=noise).to(next(experts.parameters()).dtype)
    return experts.run(x, SparseRouting.from_choice(index, weight, EXPERTS)).float().square().mean()


def gradients(experts: Experts, loss: Callable[[Experts, int], Tensor] = micro_batch) -> dict[str, Tensor]:
    """After three micro-batches."""
    for number in range(3):
        loss(experts, number).backward()
    return {name: parameter.grad for name, parameter in experts.named_parameters() if parameter.grad is not None}


# hidden: several experts in one product, or one in each; few: an expert has more rows, or fewer
@pytest.mark.parametrize(("hidden", "few"), [(24, 0), (2800, 0), (2800, 256)])
@pytest.mark.parametrize(("activation", "bias"), [("swiglu", True), ("relu", False)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_sum_is_that_of_autograd(
    dtype: torch.dtype, hidden: int, few: int, activation: str, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrices, "FEW_ROWS", few)
    plain, in_place = (a_bank(hidden, activation, bias).to(dtype) for _ in range(2))
    assert accumulate_in_place(in_place) == [""]
    wanted = gradients(plain)
    with Calls() as calls:
        found = gradients(in_place)
    assert calls.in_place == 2  # the first micro-batch has nothing to add to
    assert found.keys() == dict(plain.named_parameters()).keys()
    for name, gradient in found.items():
        scale = wanted[name].abs().max().item()
        assert_close(gradient, wanted[name], rtol=0, atol=8 * torch.finfo(dtype).eps * scale)


def test_float32_gradients_of_bfloat16_products_are_those_of_autograd_to_the_bit() -> None:
    def loss(experts: Experts, number: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return micro_batch(experts, number)

    plain, in_place = a_bank(2800), a_bank(2800)
    accumulate_in_place(in_place)
    wanted = gradients(plain, loss)
    with Calls() as calls:
        found = gradients(in_place, loss)
    assert calls.in_place == 2
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("threads", [1, 2])
def test_gradients_stay_where_they_are(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        experts = a_bank()
        accumulate_in_place(experts)
        micro_batch(experts, 0).backward()
        held = {name: parameter.grad for name, parameter in experts.named_parameters()}
        gradients(experts)
        assert all(parameter.grad is held[name] for name, parameter in experts.named_parameters())
    finally:
        torch.set_num_threads(before)


def test_a_bank_used_twice_in_one_graph_and_a_graph_walked_twice_add_up() -> None:
    def loss(experts: Experts, number: int) -> Tensor:
        return micro_batch(experts, number) + micro_batch(experts, number + 5)

    def twice(experts: Experts) -> dict[str, Tensor]:
        gradients(experts, loss)
        value = loss(experts, 9)
        value.backward(retain_graph=True)
        value.backward()
        return {
            name: parameter.grad for name, parameter in experts.named_parameters() if parameter.grad is not None
        }

    plain, in_place = a_bank(), a_bank()
    accumulate_in_place(in_place)
    wanted = twice(plain)
    with Calls() as calls:
        found = twice(in_place)
    assert calls.in_place == 2 * 2 + 2 * 2
    assert_close(found, wanted)


def test_activation_checkpointing_adds_in_place_too() -> None:
    def loss(experts: Experts, number: int) -> Tensor:
        return checkpoint(micro_batch, experts, number, use_reentrant=False)  # type: ignore[no-any-return]

    plain, in_place = a_bank(), a_bank()
    accumulate_in_place(in_place)
    wanted = gradients(plain)
    with Calls() as calls:
        found = gradients(in_place, loss)
    assert calls.in_place == 2
    assert_close(found, wanted)


def with_hook(experts: Experts) -> list[Tensor]:
    seen: list[Tensor] = []
    experts.down.register_hook(lambda gradient: seen.append(gradient.clone()))
    gradients(experts)
    return seen


def with_hook_afterwards(experts: Experts) -> list[Tensor]:
    seen: list[Tensor] = []
    experts.down.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.clone()))
    gradients(experts)
    return seen


def asked_for(experts: Experts) -> list[Tensor]:
    """`torch.autograd.grad` hands gradients out and leaves `.grad` alone."""
    gradients(experts)
    found = torch.autograd.grad(micro_batch(experts, 4), list(experts.parameters()))
    return [*found, *(parameter.grad.clone() for parameter in experts.parameters())]


def of_some(experts: Experts) -> list[Tensor]:
    """`backward(inputs=...)` changes no other parameter."""
    gradients(experts)
    micro_batch(experts, 4).backward(inputs=[experts.up])
    return [parameter.grad.clone() for parameter in experts.parameters()]


def with_graph(experts: Experts) -> list[Tensor]:
    """Under `create_graph` a held gradient is not changed."""
    micro_batch(experts, 0).backward()
    held = experts.down.grad
    micro_batch(experts, 1).backward(create_graph=True)
    found = [held, *(parameter.grad.detach() for parameter in experts.parameters())]
    experts.zero_grad()
    return found


def of_casts(experts: Experts) -> list[Tensor]:
    """A parameter that reaches the bank as something computed from it."""
    originals = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in experts.named_parameters()}
    for number in range(2):
        torch.func.functional_call(
            _Loss(experts), {f"experts.{name}": 2 * each for name, each in originals.items()}, (number,)
        ).backward()
    return [each.grad for each in originals.values()]


class _Loss(nn.Module):
    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, number: int) -> Tensor:
        return micro_batch(self.experts, number)


@pytest.mark.filterwarnings("ignore:.*create_graph=True")
@pytest.mark.parametrize("use", [with_hook, with_hook_afterwards, asked_for, of_some, with_graph, of_casts])
def test_who_looks_at_gradients_sees_those_of_autograd(use: Callable[[Experts], list[Tensor]]) -> None:
    plain, in_place = a_bank(), a_bank()
    accumulate_in_place(in_place)
    wanted, found = use(plain), use(in_place)
    assert len(wanted) > 1
    assert_close(found, wanted)


def test_compiled_graphs_leave_adding_to_autograd() -> None:
    plain, in_place = a_bank(), a_bank()
    accumulate_in_place(in_place)
    compiled = torch.compile(_Loss(in_place), backend="aot_eager")
    wanted = gradients(plain)
    found = gradients(in_place, lambda _, number: compiled(number))
    assert_close(found, wanted)


def test_the_option_can_be_taken_back_and_names_who_has_it() -> None:
    model = nn.ModuleDict(
        {
            "fast": a_bank(),
            "slow": make_experts(2, 4, 5, kernel="loop"),
            "tiled": make_experts(2, 4, 5, kernel="tiled"),
        }
    )
    assert accumulate_in_place(model) == ["fast"]
    accumulate_in_place(model, False)
    with Calls() as calls:
        gradients(model["fast"])
    assert calls.in_place == 0


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_keeps_the_rules_of_torch_library(dtype: torch.dtype, activation: str) -> None:
    *given, _, _ = (
        each.detach() if isinstance(each, Tensor) else each for each in arguments(activation, dtype=dtype)
    )
    x, parameters = given[0], dict(zip(PARAMETERS, given[6:12], strict=True))
    earlier = [None if each is None or name == "up" else torch.ones_like(each) for name, each in parameters.items()]
    needs = [True, True, *(each is not None for each in earlier)]
    torch.library.opcheck(bank_backward_into, (*earlier, torch.ones_like(x), x.new_empty(0, 5), needs, *given))
