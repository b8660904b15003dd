"""Quantised experts compute what their codes stand for, whatever the number of rows."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from moestro.experts import GLU, MLP, CopyExperts, QuantisedExperts, make_experts, quantise, quantise_linear
from moestro.experts.activations import GATED, PLAIN
from moestro.kernels.packed import pack_codes, quantise_rows, unpack_codes
from moestro.routing import SparseRouting

each_width = pytest.mark.parametrize("bits", [8, 4])


def by_hand(experts: QuantisedExperts, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Token by token and choice by choice in float64, from the dequantised weights."""
    y = torch.zeros_like(x, dtype=torch.float64)
    for token in range(len(x)):
        for e, share in zip(index[token].tolist(), weight[token].tolist(), strict=True):
            hidden = x[token].double() @ experts.up.matrix(e).double()
            if experts.up_bias is not None:
                hidden = hidden + experts.up_bias[e].double()
            if experts.activation in GATED:
                gate, up = hidden.chunk(2)
                hidden = GATED[experts.activation](gate) * up
            else:
                hidden = PLAIN[experts.activation](hidden)
            out = hidden @ experts.down.matrix(e).double()
            y[token] += share * (out if experts.down_bias is None else out + experts.down_bias[e].double())
    return y


def choices(tokens: int, num_experts: int, k: int) -> tuple[Tensor, Tensor]:
    return torch.rand(tokens, num_experts).topk(k).indices, torch.rand(tokens, k)


def bank_of(activation: str, width: int, hidden: int, num_experts: int = 4, bias: bool = False) -> GLU | MLP:
    bank = make_experts(num_experts, width, hidden, activation, bias)
    for name, parameter in bank.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter)
    return bank


@each_width
@pytest.mark.parametrize("tokens", [0, 1, 2, 4, 5, 16, 33, 100])
@pytest.mark.parametrize(("activation", "bias"), [("swiglu", False), ("geglu", True), ("relu", True)])
def test_equals_the_dequantised_experts_for_any_number_of_rows(bits, tokens, activation, bias):
    experts, _ = quantise(bank_of(activation, 48, 40, bias=bias), bits, group=32)
    index, weight = choices(tokens, 4, 2)
    x = torch.randn(tokens, 48)
    with torch.inference_mode():
        y = experts.run(x, SparseRouting.from_choice(index, weight, 4))
    expected = by_hand(experts, x, index, weight)
    assert y.dtype == torch.float32
    # rows are rounded to bfloat16 (2^-9), and to int8 (a 127th of their largest entry) where there are many
    assert float((y - expected).norm()) <= 0.015 * float(expected.norm()) + 1e-12


@each_width
@pytest.mark.parametrize(("width", "hidden"), [(1, 1), (7, 3), (33, 130), (64, 64), (250, 77)])
def test_any_size_works(bits, width, hidden):
    experts, _ = quantise(bank_of("swiglu", width, hidden), bits)
    index, weight = choices(30, 4, 3)
    x = torch.randn(30, width)
    with torch.inference_mode():
        y = experts.run(x, SparseRouting.from_choice(index, weight, 4))
    expected = by_hand(experts, x, index, weight)
    assert float((y - expected).norm()) <= 0.02 * float(expected.norm())


@each_width
@pytest.mark.parametrize("scale", ["output", "input"])
def test_one_token_equals_the_same_token_among_others(bits, scale):
    experts, _ = quantise(bank_of("swiglu", 64, 64), bits)
    x, (index, weight) = torch.randn(4, 64), choices(4, 4, 2)
    with torch.inference_mode():
        together = experts.run(x, SparseRouting.from_choice(index, weight, 4, scale=scale))
        alone = [
            experts.run(row, SparseRouting.from_choice(chosen, share, 4, scale=scale))
            for row, chosen, share in zip(x.split(1), index.split(1), weight.split(1), strict=True)
        ]
    assert_close(torch.cat(alone), together, rtol=2e-2, atol=2e-2)


def test_eight_bits_are_exact_for_weights_that_are_codes_already():
    bank = MLP(2, 64, 64, "relu")
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.copy_(torch.randint(-127, 128, parameter.shape) / 64)
            parameter[:, 0] = 127 / 64
    experts, errors = quantise(bank, 8)
    assert [error.error for error in errors] == [0, 0]
    assert_close(experts.up.matrix(1), bank.up[1].detach(), rtol=0, atol=0)


def test_four_bits_are_exact_for_weights_that_are_codes_already():
    bank = MLP(2, 64, 64, "relu")
    with torch.no_grad():
        for parameter in bank.parameters():
            code = torch.randint(-7, 8, (2, 2, 32, 64)).float()
            code[:, :, 0] = 7
            code *= torch.tensor([15.0, 6.0]).view(1, 2, 1, 1)  # two groups, whose scales are 15 and 6 units
            parameter.copy_(code.flatten(1, 2) / 8)
    experts, errors = quantise(bank, 4, group=32)
    assert [error.error for error in errors] == [0, 0]
    assert_close(experts.down.matrix(0), bank.down[0].detach(), rtol=0, atol=0)


@each_width
def test_errors_are_those_of_the_weights(bits):
    bank = bank_of("swiglu", 128, 96)
    experts, errors = quantise(bank, bits)
    up = torch.stack([experts.up.matrix(e) for e in range(4)])
    down = torch.stack([experts.down.matrix(e) for e in range(4)])
    for error, got, want in zip(errors, (*up.chunk(2, 2), down), (bank.gate, bank.up, bank.down), strict=True):
        want = want.detach()
        lost = (got - want).flatten(1).norm(dim=1)
        assert error.worst == pytest.approx(float((lost / want.flatten(1).norm(dim=1)).max()), rel=1e-4)
        assert error.error == pytest.approx(float(lost.norm() / want.norm()), rel=1e-4)
        # normal weights: the largest is about 3 sigma, a step that over 127 or 7, the error a step over sqrt(12)
        assert error.error < {8: 0.01, 4: 0.13}[bits]
    assert [error.name for error in errors] == ["gate", "up", "down"]
    assert "error" in str(errors[0])


@each_width
def test_codes_are_as_small_as_they_claim(bits):
    experts, errors = quantise(bank_of("swiglu", 256, 128), bits)
    total = sum(buffer.nbytes for buffer in experts.buffers()) * 8
    assert total / (3 * 256 * 128 * 4) == pytest.approx((2 * errors[0].bits + errors[2].bits) / 3)
    assert total / (3 * 256 * 128 * 4) < bits * 1.2
    assert experts.parameters_per_expert() == 3 * 256 * 128


@each_width
def test_rows_receive_the_gradient_of_the_dequantised_experts(bits):
    experts, _ = quantise(bank_of("swiglu", 64, 64), bits)
    x = torch.randn(6, 64, requires_grad=True)
    index, weight = choices(6, 4, 2)
    y = experts.run(x, SparseRouting.from_choice(index, weight, 4))
    expected = by_hand(experts, x, index, weight)
    assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    target = torch.randn(6, 64)
    (got,) = torch.autograd.grad((y * target).sum(), x)
    (want,) = torch.autograd.grad((expected * target).sum(), x)
    assert_close(got, want, rtol=1e-4, atol=1e-4)


@each_width
def test_casting_and_reloading_keep_the_codes(bits):
    experts, _ = quantise(bank_of("swiglu", 64, 64), bits)
    x, offsets = torch.randn(5, 64), torch.tensor([0, 2, 2, 4, 5])
    with torch.inference_mode():
        before = experts(x, offsets)
        experts.bfloat16().float().double()
        assert experts.up.scale.dtype == torch.bfloat16
        assert_close(experts(x, offsets), before, rtol=0, atol=0)
        fresh = QuantisedExperts(4, 64, 64, bits=bits)
        fresh(x, offsets)  # views of its first codes must not outlive them
        fresh.load_state_dict(experts.state_dict())
        assert_close(fresh(x, offsets), before, rtol=0, atol=0)
        other = QuantisedExperts(4, 64, 64, bits=bits)
        other(x, offsets)
        other.load_state_dict(experts.state_dict(), assign=True)
        assert_close(other(x, offsets), before, rtol=0, atol=0)


def test_a_row_of_zeros_and_weights_of_zeros_stay_zero():
    bank = MLP(1, 64, 64, "relu")
    torch.nn.init.zeros_(bank.up)
    for bits in (8, 4):
        experts, errors = quantise(bank, bits)
        assert errors[0].error == 0
        with torch.inference_mode():
            assert not experts(torch.zeros(20, 64), torch.tensor([0, 20])).any()


def test_packed_codes_come_back():
    code = torch.randint(0, 16, (192, 96), dtype=torch.int32)
    assert_close(unpack_codes(pack_codes(code)), (code - 8).t().to(torch.int8).contiguous())


@each_width
@pytest.mark.parametrize("length", [1, 40])
def test_linear_maps_keep_their_shape_and_bias(bits, length):
    linear = torch.nn.Linear(96, 80)
    quantised, error = quantise_linear(linear, bits)
    x = torch.randn(2, length, 96)
    with torch.inference_mode():
        y = quantised(x)
    expected = x @ quantised.matrix.matrix(0) + linear.bias.detach()
    assert y.shape == (2, length, 80)
    assert float((y - expected).norm() / expected.norm()) < 0.015
    assert error.error < {8: 0.01, 4: 0.13}[bits]


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="8 or 4 bits"):
        quantise(GLU(2, 8, 8), bits=3)
    with pytest.raises(ValueError, match="choose one of 32, 64"):
        quantise(GLU(2, 8, 8), bits=4, group=48)
    with pytest.raises(ValueError, match="only GLU and MLP banks"):
        quantise(CopyExperts(2, 8))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="merge the float bank"):
        quantise(GLU(2, 8, 8))[0].merged(torch.ones(1, 2), torch.ones(1, 8), torch.tensor([0, 1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_many_rows_are_rounded_each_by_its_own_largest(dtype):
    rows = torch.randn(1030, 64).mul(torch.rand(1030, 1) + 0.1).to(dtype)  # three parts, the last of six rows
    codes, scale = quantise_rows(rows)
    largest = rows.float().abs().amax(1, keepdim=True)
    assert torch.equal(scale, largest / 127)
    assert torch.equal(codes, (rows.float() / scale).round().to(torch.int8))
