"""Compiled experts compute what their weights or codes stand for, for every size, activation and thread count."""

import pytest
import torch
from torch import Tensor

from moestro.experts import (
    GLU,
    MLP,
    FeedForward,
    GatedFeedForward,
    QuantisedExperts,
    make_experts,
    quantise,
    quantise_feed_forward,
)
from moestro.experts.activations import ACTIVATIONS, GATED, PLAIN
from moestro.experts.compiled import CompiledBank, CompiledNetwork, suits_compiled, suits_compiled_network
from moestro.inference import lay_out_for_decoding
from moestro.kernels.compiled import why_not

if why_not():
    pytest.skip(why_not(), allow_module_level=True)

# widths, hidden sizes, experts: multiples of every block, of none, and as small as they get
SIZES = [(64, 64, 4, 2), (128, 192, 8, 8), (77, 53, 5, 3), (1, 1, 1, 1), (250, 130, 6, 4), (33, 257, 2, 2)]
LAYOUTS = ("float32", "float32 rows", "bfloat16", "bfloat16 rows", "8 bits", "4 bits")


@pytest.fixture
def threads():
    """Sets a number of threads; the old one comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def bank_of(layout: str, width: int, hidden: int, num_experts: int, activation: str, bias: bool):
    bank = make_experts(num_experts, width, hidden, activation, bias)
    for name, parameter in bank.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    if layout.endswith("bits"):
        return quantise(bank, int(layout[0]), group=32)[0]
    bank = bank.to(getattr(torch, layout.split()[0]))
    if layout.endswith("rows"):
        lay_out_for_decoding(bank, "compiled")
        assert bank.up.mT.is_contiguous()
    return bank


def rounded(row: Tensor, group: int) -> Tensor:
    """A row in 8 bits, each group with a scale of its own, as 4-bit products round it."""
    grouped = torch.nn.functional.pad(row, (0, -len(row) % group)).view(-1, group)
    unit = grouped.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return ((grouped / unit + 0.5).floor() * unit).flatten()[: len(row)]


def by_hand(bank: GLU | MLP | QuantisedExperts, row: Tensor, index: list[int], weight: list[float]) -> Tensor:
    """Choice by choice in float64, from what codes stand for; rows are rounded before 4-bit products."""

    def seen(x: Tensor) -> Tensor:
        return rounded(x, bank.group) if getattr(bank, "bits", 16) == 4 else x

    def weights(name: str, expert: int) -> Tensor:
        if isinstance(bank, QuantisedExperts):
            return getattr(bank, name).matrix(expert).double()
        inner = [bank.gate, bank.up] if isinstance(bank, GLU) and name == "up" else [getattr(bank, name)]
        return torch.cat([each[expert] for each in inner], dim=1).double()

    def biases(name: str, expert: int) -> Tensor | float:
        whole = [getattr(bank, f"{name}_bias")]
        if isinstance(bank, GLU) and name == "up":
            whole.insert(0, bank.gate_bias)
        return 0.0 if whole[0] is None else torch.cat([each[expert] for each in whole]).double()

    y = torch.zeros(bank.width, dtype=torch.float64)
    for expert, share in zip(index, weight, strict=True):
        hidden = seen(row.double()) @ weights("up", expert) + biases("up", expert)
        if bank.activation in GATED:
            gate, up = hidden.chunk(2)
            hidden = GATED[bank.activation](gate) * up
        else:
            hidden = PLAIN[bank.activation](hidden)
        y += share * (seen(hidden) @ weights("down", expert) + biases("down", expert))
    return y


def far(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm().clamp(min=1e-9))


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_a_loop_in_float64(layout, count, threads):
    threads(count)
    for number, (width, hidden, num_experts, k) in enumerate(SIZES):
        for activation in ACTIVATIONS:
            bank = bank_of(layout, width, hidden, num_experts, activation, bias=number % 2 == 1)
            assert suits_compiled(bank)
            row, weight, residual = torch.randn(1, width), torch.rand(1, k), torch.randn(1, width)
            index = torch.rand(num_experts).topk(k).indices
            y = CompiledBank(bank)(row, index, weight, residual)
            expected = by_hand(bank, row[0], index.tolist(), weight[0].tolist())
            case = (width, hidden, activation, bank)
            # a number of a row may lie so near between two codes that float32 rounds it the other way
            assert far(y[0] - residual[0], expected) < (2e-2 if layout == "4 bits" else 2e-5), case
            expected += residual[0]
            assert far(y[0], expected) < (2e-2 if layout == "4 bits" else 2e-5), case


@torch.no_grad()
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_network_equals_itself_in_float64(layout, gated, threads):
    threads(2)
    for number, (width, hidden, *_) in enumerate(SIZES):
        for activation in ACTIVATIONS:
            module, share = FeedForward(width, hidden, activation, bias=number % 2 == 1), torch.ones(())
            for name, parameter in module.named_parameters():
                if name.endswith("bias"):
                    torch.nn.init.normal_(parameter)
            module = module if layout.endswith("bits") else module.to(getattr(torch, layout.split()[0]))
            oracle = FeedForward(width, hidden, activation, bias=number % 2 == 1).double()
            oracle.load_state_dict({name: tensor.double() for name, tensor in module.state_dict().items()})
            if layout.endswith("rows"):
                lay_out_for_decoding(module, "compiled")
                assert module.up.mT.is_contiguous()
            if layout.endswith("bits"):
                module = quantise_feed_forward(module, int(layout[0]), group=32)[0]
            row, residual = torch.randn(1, width), torch.randn(1, width)
            expected = oracle(row.double())
            if layout.endswith("bits"):
                expected = by_hand(module.bank, row[0], [0], [1.0]).unsqueeze(0)
            if gated:
                inner, module = module, GatedFeedForward(FeedForward(width, hidden, activation))
                module.inner = inner
                module.weight.normal_(0, width**-0.5)
                share = torch.sigmoid(row.double() @ module.weight.double())
            assert suits_compiled_network(module)
            y = CompiledNetwork(module)(row, residual)
            far_off = far(y - residual, share * expected)
            assert far_off < (2e-2 if layout == "4 bits" else 2e-5), (width, hidden, activation, far_off)
    assert not suits_compiled_network(torch.nn.Linear(8, 8))


@torch.no_grad()
def test_one_bank_serves_any_number_of_experts_again_and_again():
    bank = bank_of("8 bits", 64, 128, 6, "swiglu", bias=False)
    compiled, nothing = CompiledBank(bank), torch.zeros(1, 64)
    for index in ([3], [0, 5, 2], [1, 1], [5, 4, 3, 2, 1, 0], [3]):
        row, weight = torch.randn(1, 64), torch.randn(1, len(index))
        y = compiled(row, torch.tensor(index), weight, nothing)
        assert far(y[0], by_hand(bank, row[0], index, weight[0].tolist())) < 2e-5


@torch.no_grad()
def test_repeats_to_the_bit_and_leaves_its_inputs_alone(threads):
    threads(2)
    bank = CompiledBank(bank_of("4 bits", 128, 64, 4, "geglu", bias=True))
    given = (torch.randn(1, 128), torch.tensor([2, 0]), torch.rand(1, 2), torch.randn(1, 128))
    before = [tensor.clone() for tensor in given]
    first = bank(*given)
    assert all(torch.equal(bank(*given), first) for _ in range(20))
    assert all(torch.equal(*pair) for pair in zip(given, before, strict=True))


def test_sees_weights_that_change_in_place():
    bank = bank_of("float32", 16, 8, 2, "relu", bias=False)
    compiled, row = CompiledBank(bank), torch.randn(1, 16)
    with torch.no_grad():
        bank.down.mul_(2)
        y = compiled(row, torch.tensor([1]), torch.ones(1, 1), torch.zeros(1, 16))
        assert far(y[0], by_hand(bank, row[0], [1], [1.0])) < 2e-5


def test_other_banks_are_left_to_torch():
    bank = make_experts(2, 8, 8)
    assert suits_compiled(bank)
    assert not suits_compiled(make_experts(2, 8, 8).double())
    bank.up.data = torch.randn(8, 2, 8).transpose(0, 1)
    assert not suits_compiled(bank)
