"""The Triton kernels in Triton's interpreter. `test_triton.py` runs this file in a process of its own.

The interpreter takes about ten milliseconds for each step of a tile, so layers are small here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles.bank import RandomLayer, check_layer
from torch import Tensor
from torch.testing import assert_close

from moestro.experts import ACTIVATIONS, make_experts
from moestro.kernels import grouped_matmul
from moestro.kernels.triton import is_interpreted
from moestro.kernels.triton import settings as tiles
from moestro.kernels.triton.operator import triton_bank
from moestro.kernels.triton.product import grouped_product
from moestro.routing import SparseRouting

TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 4e-2}  # of sizes, see test_bank.py
assert is_interpreted()


@dataclass(frozen=True)
class Case(RandomLayer):
    setting: str
    routing: str
    strided: bool
    recompute: bool
    seed: int


def cases(most_pairs: int) -> st.SearchStrategy[Case]:
    @st.composite
    def draw_case(draw: st.DrawFn) -> Case:
        num_experts = draw(st.integers(1, 17))
        k = draw(st.one_of(st.integers(1, min(3, num_experts)), st.integers(1, num_experts)))
        return Case(
            tokens=draw(st.one_of(st.integers(0, 3), st.integers(0, min(70, most_pairs // k)))),
            num_experts=num_experts,
            k=k,
            ways=draw(st.one_of(st.just(k), st.integers(k, num_experts))),
            width=draw(st.integers(1, 70)),
            hidden=draw(st.integers(1, 70)),
            activation=draw(st.sampled_from(ACTIVATIONS)),
            bias=draw(st.booleans()),
            dtype=draw(st.sampled_from(list(TOLERANCE))),
            setting=draw(st.sampled_from(list(tiles.SETTINGS))),
            routing=draw(st.sampled_from(["choice", "dropped", "no slots"])),
            strided=draw(st.booleans()),
            recompute=draw(st.booleans()),
            seed=draw(st.integers(0, 2**31)),
        )

    return draw_case()


def compare(case: Case) -> None:
    torch.manual_seed(case.seed)
    experts = make_experts(
        case.num_experts, case.width, case.hidden, case.activation, case.bias, "triton", case.recompute
    ).to(case.dtype)
    with torch.no_grad():
        for name, parameter in experts.named_parameters():
            parameter.normal_(0, 0.3 if name.endswith("bias") else parameter.shape[1] ** -0.5)
            if case.strided and parameter.dim() == 3:
                parameter.data = parameter.data.transpose(1, 2).contiguous().transpose(1, 2)
    x = torch.randn(case.tokens, case.width + 3 * case.strided).to(case.dtype)[:, : case.width].requires_grad_()
    index = torch.rand(case.tokens, case.ways).topk(case.k).indices
    weight = torch.rand(case.tokens, case.k).clamp(min=1e-6).requires_grad_()  # 0 is no choice to the loop
    keep = torch.rand(case.tokens, case.k) < 0.7 if case.routing == "dropped" else None
    routing = SparseRouting.from_choice(index, weight, case.num_experts, keep)
    if case.routing == "no slots":
        routing = SparseRouting(routing.token, routing.weight, routing.offsets, case.tokens)
    with patch.object(tiles, "setting_for", lambda pairs, num_experts: case.setting):
        y = experts.run(x, routing)
    upstream = torch.randn(1, case.width).to(case.dtype).expand_as(y) if case.strided else torch.randn_like(y)
    parameters = dict(experts.named_parameters())
    got = torch.autograd.grad(y, [x, weight, *parameters.values()], upstream)

    found = dict(zip(["y", "x", "weight", *parameters], (y, *got), strict=True))
    check_layer(found, x, weight, index, keep, parameters, case.activation, upstream, TOLERANCE[case.dtype])


quiet = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


@settings(max_examples=8, **quiet)
@given(cases(most_pairs=30))
def test_random_layers_equal_the_oracle(case: Case) -> None:
    compare(case)


@pytest.mark.nightly
@settings(max_examples=150, **quiet)
@given(cases(most_pairs=700))
def test_many_random_layers_equal_the_oracle(case: Case) -> None:
    compare(case)


def layer(
    activation: str = "swiglu", bias: bool = True, tokens: int = 40, dtype: torch.dtype = torch.float32
) -> tuple[torch.nn.Module, Tensor, SparseRouting]:
    """A bank with an expert without rows, several tiles in each direction, and one expert with most rows."""
    experts = make_experts(4, 70, 66, activation, bias, "triton").to(dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, 0, 0.2)
    index = torch.stack([torch.zeros(tokens, dtype=torch.long), torch.randint(1, 3, (tokens,))], 1)
    return experts, torch.randn(tokens, 70).to(dtype), SparseRouting.from_choice(index, torch.rand(tokens, 2), 4)


def gradients(experts: torch.nn.Module, x: Tensor, routing: SparseRouting) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = experts.run(x, routing)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *experts.parameters()])]


@pytest.mark.parametrize("setting", ["few", "many"])
def test_repetition_gives_the_same_bits(setting: str) -> None:
    given = layer(dtype=torch.bfloat16)
    with patch.object(tiles, "setting_for", lambda pairs, num_experts: setting):
        assert all(torch.equal(a, b) for a, b in zip(gradients(*given), gradients(*given), strict=True))


def test_tiles_change_the_time_and_not_the_result() -> None:
    """Expert 0 has 40 rows: more than one tile of `few`, and more than one step of the gradient of its weights."""
    given, found = layer("geglu"), []
    plain = make_experts(4, 70, 66, "geglu", True, "loop")
    plain.load_state_dict(given[0].state_dict())
    expected = gradients(plain, *given[1:])
    for setting in tiles.SETTINGS:
        with patch.object(tiles, "setting_for", lambda pairs, num_experts, setting=setting: setting):
            found.append(gradients(*given))
    for other in found:
        for got, want in zip(other, expected, strict=True):
            assert_close(got, want, rtol=0, atol=2e-5 * float(want.abs().max()))


def test_rows_without_a_routing_run_too() -> None:
    experts, x, _ = layer("gelu")
    offsets, rows = torch.tensor([0, 36, 36, 39, 40]), x.clone().requires_grad_()
    plain = make_experts(4, 70, 66, "gelu", True, "loop")
    plain.load_state_dict(experts.state_dict())
    y, expected = experts(rows, offsets), plain(rows, offsets)
    assert_close(y, expected, rtol=1e-4, atol=1e-5)
    got = torch.autograd.grad(y.square().sum(), [rows, *experts.parameters()])
    want = torch.autograd.grad(expected.square().sum(), [rows, *plain.parameters()])
    assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_an_expert_meets_only_its_own_tokens() -> None:
    experts = make_experts(3, 4, 5, kernel="triton")
    x = torch.randn(9, 4)
    x[0] = torch.nan
    index = torch.tensor([[0]] + [[1]] * 5 + [[2]] * 3)
    experts.run(x, SparseRouting.from_choice(index, torch.ones(9, 1), 3)).sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad is not None
        assert parameter.grad[0].isnan().all()
        assert parameter.grad[1:].isfinite().all()


def test_the_host_asks_nothing_of_the_device() -> None:
    experts, x, _ = layer(tokens=9)
    index, weight = torch.randint(0, 4, (9, 1)), torch.rand(9, 1)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the host waits for a value of the device")

    with patch.multiple(Tensor, item=refuse, tolist=refuse, nonzero=refuse, __int__=refuse, __bool__=refuse):
        y = experts.run(x.requires_grad_(), SparseRouting.from_choice(index, weight, 4))
        y.backward(torch.ones_like(y))
    assert x.grad is not None


def test_autocast_casts_the_weights() -> None:
    experts, x, routing = layer(bias=False, tokens=8)
    with torch.autocast("cpu", torch.bfloat16):
        y = experts.run(x, routing)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in experts.parameters())
    assert_close(y.float(), experts.run(x, routing), rtol=5e-2, atol=5e-2)
    with pytest.raises(ValueError, match=r"got torch.bfloat16 and torch.float32; cast them, use autocast"):
        experts.run(x.bfloat16(), routing)
    with pytest.raises(ValueError, match="rows have width 69 but the experts take 70"):
        experts.run(x[:, :69], routing)
    with pytest.raises(ValueError, match=r"got torch.float64 .* use kernel='loop'"):
        experts.double().run(x.double(), routing)


def arguments(activation: str, dtype: torch.dtype) -> tuple[object, ...]:
    experts = make_experts(3, 3, 5, activation, True).to(dtype)
    x = torch.randn(4, 3).to(dtype).requires_grad_()
    routing = SparseRouting.from_choice(torch.rand(4, 2).topk(2).indices, torch.rand(4, 2), 3)
    order, starts = routing.by_token()
    gate, gate_bias = getattr(experts, "gate", None), getattr(experts, "gate_bias", None)
    return (
        x, routing.offsets, routing.token, routing.weight.requires_grad_(), order, starts,
        gate, experts.up, experts.down, gate_bias, experts.up_bias, experts.down_bias,
        activation, "some", True,
    )  # fmt: skip


@pytest.mark.parametrize(("activation", "dtype"), [("swiglu", torch.float32), ("relu", torch.bfloat16)])
def test_the_operators_keep_the_rules_of_torch_library(activation: str, dtype: torch.dtype) -> None:
    given = arguments(activation, dtype)
    torch.library.opcheck(triton_bank, given)
    x = torch.randn(6, 3).to(dtype).requires_grad_()
    weight, offsets = torch.randn(3, 3, 2).to(dtype).requires_grad_(), torch.tensor([0, 2, 2, 6])
    torch.library.opcheck(grouped_product, (x, weight, offsets))
    grad = torch.randn(6, 2).to(dtype).requires_grad_()
    torch.library.opcheck(torch.ops.moestro.triton_outer.default, (x, grad, offsets))


def test_a_second_derivative_of_the_bank_is_refused_in_words() -> None:
    given = arguments("swiglu", torch.float32)
    x = given[0]
    assert isinstance(x, Tensor)
    (gradient,) = torch.autograd.grad(triton_bank(*given)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="kernel='loop' to differentiate twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("loads", [[3, 0, 21, 1], [0, 0, 4], [0, 0]], ids=str)
@pytest.mark.parametrize(("width", "out"), [(7, 3), (40, 70)])
def test_the_product_alone_equals_the_loop_twice_differentiated(loads: list[int], width: int, out: int) -> None:
    offsets = torch.tensor([0, *loads]).cumsum(0)
    rows, weight = torch.randn(sum(loads), width), torch.randn(len(loads), width, out)
    probe, again = torch.randn(sum(loads), out), torch.randn(sum(loads), width)

    def run(backend: str, dtype: torch.dtype) -> list[Tensor]:
        r, w = rows.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        y = grouped_matmul(r, w, offsets, backend)
        first = torch.autograd.grad((y.square() * probe.to(dtype)).sum(), [r, w], create_graph=True)
        second = torch.autograd.grad((first[0] * again.to(dtype)).sum() + first[1].square().sum(), [r, w])
        return [y, *first, *second]

    for got, want in zip(run("triton", torch.float32), run("loop", torch.float64), strict=True):
        scale = float(want.detach().abs().max()) if want.numel() else 1.0
        assert_close(got.double(), want, rtol=0, atol=2e-5 * max(scale, 1.0))


@pytest.mark.nightly
@pytest.mark.parametrize("training", [False, True])
def test_a_layer_compiles_into_one_graph(training: bool) -> None:
    from methods.test_compile import METHODS, check_one_graph

    check: Callable[..., None] = check_one_graph
    (mixtral,) = [method for method in METHODS if method.name == "mixtral"]
    check(mixtral, training, "triton")
