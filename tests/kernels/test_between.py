"""What a bank does between its products: the compiled pass equals float64, and torch's operators."""

import pytest
import torch
from torch import Tensor

from moestro.kernels import between
from moestro.kernels.between import FEWEST_COLUMNS, OnePass, Operators, between_for
from moestro.kernels.compiled import why_not
from moestro.kernels.plan import Chunk

needs_numba = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
TOLERANCE = {torch.bfloat16: 5e-3, torch.float32: 1e-6}


def chunk_of(rows: int) -> Chunk:
    return Chunk(0, rows, [0], [rows])


def oracle(inner: Tensor, dh: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """h, h w, d_inner and dw one number at a time in float64."""
    rows, hidden = dh.shape
    h, weighted = torch.zeros(rows, hidden).double(), torch.zeros(rows, hidden).double()
    d_inner, d_weight = torch.zeros(rows, 2 * hidden).double(), torch.zeros(rows).double()
    for row in range(rows):
        for column in range(hidden):
            gate, up = inner[row, column].double(), inner[row, hidden + column].double()
            share, upstream = 1 / (1 + (-gate).exp()), dh[row, column].double()
            h[row, column] = gate * share * up
            weighted[row, column] = h[row, column] * weight[row].double()
            d_weight[row] += upstream * h[row, column]
            upstream = upstream * weight[row].double()
            d_inner[row, column] = upstream * up * (share + gate * share * (1 - share))
            d_inner[row, hidden + column] = upstream * gate * share
    return h, weighted, d_inner, d_weight


def both_ways(way: between.Between, inner: Tensor, dh: Tensor, weight: Tensor | None) -> tuple[Tensor, ...]:
    """The same four, by one of the ways; memory holds no number before."""
    rows = len(dh)
    h, weighted = torch.full_like(dh, torch.nan), torch.full_like(dh, torch.nan)
    d_inner, d_weight = torch.full_like(inner, torch.nan), torch.full((rows,), torch.nan)
    way.forward(chunk_of(rows), inner, h)
    spare = dh.new_empty(rows, way.spare)
    wanted = None if weight is None else d_weight
    way.backward(chunk_of(rows), inner, dh.clone(), weight, weighted, d_inner, wanted, spare)
    return h, weighted, d_inner, d_weight


def case(rows: int, hidden: int, dtype: torch.dtype, spread: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    inner = torch.randn(rows, 2 * hidden) * spread
    return inner.to(dtype), torch.randn(rows, hidden).to(dtype), torch.rand(rows)


def far(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@needs_numba
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("hidden", [16, 17, 31, 32, 40, 77])
def test_one_pass_equals_float64(hidden: int, dtype: torch.dtype) -> None:
    torch.manual_seed(hidden)
    given = case(5, hidden, dtype)
    way = between_for("swiglu", hidden, given[0])
    assert isinstance(way, OnePass)
    for found, expected in zip(both_ways(way, *given), oracle(*given), strict=True):
        assert far(found, expected) < TOLERANCE[dtype]


@needs_numba
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_one_pass_equals_the_operators_also_without_weights(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inner, dh, weight = case(64, 48, dtype)
    one, many = OnePass("swiglu", 48, dtype), Operators("swiglu", 48)
    for weights in (weight.to(dtype).float(), None):
        results = zip(both_ways(one, inner, dh, weights), both_ways(many, inner, dh, weights), strict=True)
        for found, expected in list(results)[: 4 if weights is not None else 3]:
            assert far(found, expected) < 4 * TOLERANCE[dtype]


@needs_numba
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_one_pass_is_right_far_out(dtype: torch.dtype) -> None:
    gate = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e4, -1e4, 88, -88, 87.5, -87.5, 30, -30, 5, -5, 1e30, -1e30])
    inner = torch.cat([gate, torch.ones(16)]).unsqueeze(0).to(dtype)
    dh, weight = torch.ones(1, 16, dtype=dtype), torch.ones(1)
    h, _, d_inner, _ = both_ways(OnePass("swiglu", 16, dtype), inner, dh, weight)
    z = inner[:, :16].double().requires_grad_()
    expected = torch.nn.functional.silu(z)
    expected.sum().backward()
    close = {"rtol": 2 * TOLERANCE[dtype], "atol": 1e-6}
    inside = gate.abs() < 1e5  # 1e30 times the sigmoid of -87 is no small number
    torch.testing.assert_close(h.double()[:, inside], expected.detach()[:, inside], **close)
    torch.testing.assert_close(d_inner.double()[:, :16][:, inside], z.grad[:, inside], **close)
    assert float(h[0, 14]) == pytest.approx(1e30, rel=1e-2)


@needs_numba
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["gate", "up", "dh"])
def test_what_is_no_number_stays_so_in_its_own_row(dtype: torch.dtype, bad: float, place: str) -> None:
    torch.manual_seed(0)
    inner, dh, weight = case(3, 20, dtype)
    {"gate": inner[:, :20], "up": inner[:, 20:], "dh": dh}[place][1, 19] = bad
    found = both_ways(OnePass("swiglu", 20, dtype), inner, dh, weight)
    assert not all(bool(each[1].isfinite().all()) for each in found)
    assert all(bool(each[row].isfinite().all()) for each in found for row in (0, 2))
    if place != "dh":
        assert not found[0][1, 19].isfinite()
    assert not found[3][1].isfinite()


@needs_numba
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_rows_bits_depend_on_that_row_only(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inner, dh, weight = case(9, 37, dtype)
    way = OnePass("swiglu", 37, dtype)
    together = both_ways(way, inner, dh, weight)
    for row in range(9):
        alone = both_ways(way, inner[row : row + 1], dh[row : row + 1], weight[row : row + 1])
        for one, all_of_them in zip(alone, together, strict=True):
            assert torch.equal(one[0], all_of_them[row])


@needs_numba
def test_rounding_is_to_the_nearest_bfloat16_ties_to_even() -> None:
    up = torch.linspace(-3, 3, 4096).bfloat16().view(256, 16)
    gate = torch.full_like(up, 1e4)  # whose sigmoid is 1
    inner = torch.cat([gate, up], 1)
    h = both_ways(OnePass("swiglu", 16, torch.bfloat16), inner, torch.ones_like(up), torch.ones(256))[0]
    assert torch.equal(h, (gate.float() * up.float()).bfloat16())


def test_the_rest_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.zeros(1, 64)
    for activation, hidden, like in (
        ("geglu", 32, rows),
        ("swiglu", FEWEST_COLUMNS - 1, rows),
        ("swiglu", 32, rows.double()),
        ("swiglu", 32, rows.half()),
        ("swiglu", 32, rows.to("meta")),
    ):
        assert isinstance(between_for(activation, hidden, like), Operators)
    monkeypatch.setattr(between, "why_not", lambda: "numba is not installed")
    assert isinstance(between_for("swiglu", 32, rows), Operators)
