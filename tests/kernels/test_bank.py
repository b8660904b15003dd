"""The fused bank equals a float64 loop over experts in outputs and every gradient, for any layer at all."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from oracles.bank import RandomLayer, check_layer
from torch import Tensor
from torch.testing import assert_close

from moestro.experts import ACTIVATIONS, Experts, all_kernels, make_experts
from moestro.kernels.bank import bank as bank_operator
from moestro.kernels.plan import BATCHES, FEW_SIZES, most_rows
from moestro.routing import SparseRouting

# Of an entry's size, see `sizes`. In bfloat16 twenty times the 2^-9 of one rounding: nine lie between an argument
# and the gradient of `up`, and those of a pre-activation z < 0 count |z| times, as silu(z) is about z e^z there.
# The other dtypes add up hundreds of products in their own precision.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Case(RandomLayer):
    contiguous: bool
    kernel: str
    recompute: bool
    drop: bool
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_experts = draw(st.integers(1, 130))
    k = draw(st.one_of(st.integers(1, min(8, num_experts)), st.integers(1, num_experts)))
    kernel = draw(st.sampled_from(["auto", "fused", "tiled"]))
    return Case(
        tokens=draw(st.one_of(st.integers(0, 4), st.integers(0, 300))),
        num_experts=num_experts,
        k=k,
        ways=draw(st.integers(k, num_experts)),
        width=draw(st.integers(1, 260)),
        hidden=draw(st.integers(1, 260)),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        bias=draw(st.booleans()),
        dtype=draw(st.sampled_from(list(TOLERANCE))),
        contiguous=draw(st.booleans()),
        kernel=kernel,
        recompute=draw(st.booleans()),
        drop=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


def build(case: Case) -> tuple[Experts, Tensor, Tensor, Tensor, Tensor | None]:
    """The bank, x, weight, index and keep."""
    torch.manual_seed(case.seed)
    experts = make_experts(
        case.num_experts, case.width, case.hidden, case.activation, case.bias, case.kernel, case.recompute
    ).to(case.dtype)
    with torch.no_grad():
        for name, parameter in experts.named_parameters():
            parameter.normal_(0, 0.3 if name.endswith("bias") else parameter.shape[1] ** -0.5)
            if not case.contiguous and parameter.dim() == 3:
                parameter.data = parameter.data.transpose(1, 2).contiguous().transpose(1, 2)
    size = case.width if case.contiguous else case.width + 3
    x = torch.randn(case.tokens, size).to(case.dtype)[:, : case.width].requires_grad_()
    index = torch.rand(case.tokens, case.ways).topk(case.k).indices
    exact = torch.promote_types(case.dtype, torch.float32)  # routers compute in float32 at least
    weight = (
        torch.rand(case.tokens, case.k, dtype=exact).clamp(min=1e-6).requires_grad_()
    )  # 0 is no choice to the loop
    return experts, x, weight, index, torch.rand(case.tokens, case.k) < 0.7 if case.drop else None


def compare(case: Case) -> None:
    experts, x, weight, index, keep = build(case)
    routing = SparseRouting.from_choice(index, weight, case.num_experts, keep)
    y = experts.run(x, routing)
    upstream = torch.randn_like(y)
    parameters = dict(experts.named_parameters())
    got = torch.autograd.grad(y, [x, weight, *parameters.values()], upstream, allow_unused=case.tokens == 0)

    found = dict(zip(["y", "x", "weight", *parameters], (y, *got), strict=True))
    check_layer(found, x, weight, index, keep, parameters, case.activation, upstream, TOLERANCE[case.dtype])


quiet = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@pytest.mark.timeout(900)
@settings(max_examples=150, derandomize=True, **quiet)
@given(cases())
def test_random_layers_equal_the_oracle(case: Case) -> None:
    compare(case)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(20))
def test_two_thousand_random_layers_equal_the_oracle(part: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1 + part % 2)
    try:
        settings(max_examples=100, database=None, **quiet)(seed(part)(given(cases())(compare)))()
    finally:
        torch.set_num_threads(before)


def arguments(
    activation: str = "swiglu", bias: bool = True, dtype: torch.dtype = torch.float64, rounding: str = "few_sizes"
) -> tuple[object, ...]:
    """Everything the operator takes, with an expert without rows."""
    experts = make_experts(4, 3, 5, activation, bias).to(dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, 0, 0.5)
    x = torch.randn(6, 3, dtype=dtype).requires_grad_()
    index = torch.rand(6, 3).topk(2).indices
    weight = torch.rand(6, 2, dtype=dtype).requires_grad_()
    routing = SparseRouting.from_choice(index, weight, 4)
    order, starts = routing.by_token()
    gate, gate_bias = getattr(experts, "gate", None), getattr(experts, "gate_bias", None)
    pair_weight = routing.weight.detach().requires_grad_()
    return (
        x, routing.offsets, routing.token, pair_weight, order, starts,
        gate, experts.up, experts.down, gate_bias, experts.up_bias, experts.down_bias,
        activation, rounding, True, False,
    )  # fmt: skip


@pytest.mark.parametrize("rounding", ["exact", "few_sizes", "tiles", "batches"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation: str, rounding: str) -> None:
    given = arguments(activation, rounding=rounding)

    def run(*tensors: Tensor) -> Tensor:
        found = iter(tensors)
        filled = [next(found) if isinstance(a, Tensor) and a.requires_grad else a for a in given]
        return bank_operator(*filled)[0]

    assert torch.autograd.gradcheck(run, [a for a in given if isinstance(a, Tensor) and a.requires_grad])


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_keeps_the_rules_of_torch_library(dtype: torch.dtype, activation: str) -> None:
    given = arguments(activation, dtype=dtype)
    torch.library.opcheck(bank_operator, given)
    torch.library.opcheck(
        bank_operator, (given[0], torch.tensor([0, 2, 2, 5, 6]), None, None, None, None, *given[6:])
    )


def test_a_second_derivative_is_refused_in_words() -> None:
    given = arguments()
    x = given[0]
    assert isinstance(x, Tensor)
    (gradient,) = torch.autograd.grad(bank_operator(*given)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="kernel='loop' to differentiate twice"):
        gradient.sum().backward()


def test_an_expert_meets_only_its_own_tokens() -> None:
    """A token that is not finite spoils the experts it chose, and no other."""
    experts = make_experts(3, 4, 5)
    x = torch.randn(9, 4)
    x[0] = torch.nan
    index = torch.tensor([[0]] + [[1]] * 5 + [[2]] * 3)
    experts.to(torch.bfloat16).run(
        x.bfloat16(), SparseRouting.from_choice(index, torch.ones(9, 1), 3)
    ).sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad is not None
        assert parameter.grad[1:].isfinite().all()


@pytest.mark.parametrize("kernel", ["fused", "tiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repetition_gives_the_same_bits(kernel: str, dtype: torch.dtype) -> None:
    experts = make_experts(8, 48, 72, kernel=kernel).to(dtype)
    x = torch.randn(200, 48).to(dtype).requires_grad_()
    routing = SparseRouting.from_choice(torch.rand(200, 8).topk(3).indices, torch.rand(200, 3), 8)

    def run() -> list[Tensor]:
        y = experts.run(x, routing)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *experts.parameters()])]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("activation", ["swiglu", "geglu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tiled_rows_do_not_feel_their_neighbours(dtype: torch.dtype, activation: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for width, hidden in ((16, 8), (37, 61), (96, 260)):
            experts = make_experts(6, width, hidden, activation, kernel="tiled").to(dtype)
            x = torch.randn(150, width).to(dtype).requires_grad_()
            index, weight = torch.rand(150, 6).topk(2).indices, torch.rand(150, 2)
            y = experts.run(x, SparseRouting.from_choice(index, weight, 6))
            (gradient,) = torch.autograd.grad(y.sum(), x)
            for rows in ([7], [149], list(range(40, 77))):
                alone = x.detach()[rows].requires_grad_()
                z = experts.run(alone, SparseRouting.from_choice(index[rows], weight[rows], 6))
                assert torch.equal(z, y[rows])
                assert torch.equal(torch.autograd.grad(z.sum(), alone)[0], gradient[rows])
    finally:
        torch.set_num_threads(before)


def test_weights_of_another_dtype_need_autocast() -> None:
    experts = make_experts(2, 4, 5, kernel="fused")
    routing = SparseRouting.from_choice(torch.tensor([[0], [1]]), torch.ones(2, 1), 2)
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match="cast one of them, or use autocast"):
        experts.run(x.bfloat16(), routing)
    with torch.autocast("cpu", torch.bfloat16):
        y = experts.run(x, routing)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in experts.parameters())
    assert_close(y.float(), experts.run(x, routing), rtol=5e-2, atol=5e-2)


def test_only_the_asked_gradients_are_computed() -> None:
    experts = make_experts(3, 4, 5)
    experts.up.requires_grad_(False)
    x = torch.randn(6, 4)
    experts.run(
        x, SparseRouting.from_choice(torch.zeros(6, 1, dtype=torch.long), torch.ones(6, 1), 3)
    ).sum().backward()
    assert experts.up.grad is None
    assert experts.down.grad is not None


def test_few_sizes_waste_little() -> None:
    for count in range(1, 3000):
        size = FEW_SIZES(count)
        assert count <= size < count + FEW_SIZES.step
        assert size <= count * (1 + 1 / 8) or count < 32
    assert most_rows(100, 7, FEW_SIZES) == 100 + 7 * 15
    assert most_rows(100, 7, BATCHES) == 100 + 7 * 3 + 100 // 8


def test_unknown_and_unfit_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown kernel 'fast'; choose one of auto"):
        make_experts(2, 4, 4, kernel="fast")
    with pytest.raises(ValueError, match="'loop' cannot recompute"):
        make_experts(2, 4, 4, kernel="loop", recompute=True)
    with pytest.raises(ValueError, match="rows have width 5 but the experts take 4"):
        make_experts(2, 4, 4)(torch.randn(2, 5), torch.tensor([0, 1, 2]))
    assert set(all_kernels()) >= {"auto", "loop", "padded", "fused", "tiled"}
