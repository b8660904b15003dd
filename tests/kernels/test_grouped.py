"""Every back end of the grouped product equals a loop over rows, forward and backward."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from moestro.kernels import all_backends, grouped_matmul
from moestro.kernels.rounded import round_up

BACKENDS = all_backends("cpu")
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def row_by_row(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    out = []
    for i in range(len(rows)):
        e = int((offsets[1:] <= i).sum())
        out.append(sum(rows[i, j] * weight[e, j] for j in range(rows.shape[1])))
    return torch.stack(out) if out else rows.new_zeros(0, weight.shape[2]) + 0 * (rows.sum() + weight.sum())


def case(loads: list[int], width: int, out: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    offsets = torch.tensor([0, *loads]).cumsum(0)
    rows = torch.randn(sum(loads), width, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(len(loads), width, out, dtype=torch.float64).to(dtype).requires_grad_()
    return rows, weight, offsets


@each_backend
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)],
    ids=["float64", "float32", "bfloat16"],
)
@pytest.mark.parametrize("loads", [[3, 0, 5, 1], [0, 0, 4], [7], [0, 0], [1, 1, 1]], ids=str)
@pytest.mark.parametrize(("width", "out"), [(1, 1), (7, 3), (16, 8), (33, 50)])
def test_equals_row_by_row(
    backend: str, dtype: torch.dtype, tolerance: float, loads: list[int], width: int, out: int
) -> None:
    rows, weight, offsets = case(loads, width, out, dtype)
    y = grouped_matmul(rows, weight, offsets, backend)
    expected = row_by_row(rows.double(), weight.double(), offsets)
    scale = width**0.5
    assert y.dtype == dtype
    assert_close(y.double(), expected, rtol=tolerance, atol=tolerance * scale)
    target = torch.randn_like(expected)
    got = torch.autograd.grad((y.double() * target).sum(), (rows, weight))
    want = torch.autograd.grad((expected * target).sum(), (rows, weight))
    for g, w in zip(got, want, strict=True):
        assert_close(g.double(), w.double(), rtol=tolerance, atol=tolerance * max(1.0, out**0.5 * 3))


@each_backend
def test_gradcheck(backend: str) -> None:
    rows, weight, offsets = case([2, 0, 3], 3, 2, torch.float64)
    assert torch.autograd.gradcheck(lambda r, w: grouped_matmul(r, w, offsets, backend), (rows, weight))


@each_backend
def test_expanded_and_transposed_inputs_work(backend: str) -> None:
    rows, weight, offsets = case([4, 4], 8, 8, torch.float32)
    flipped = weight.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    assert_close(grouped_matmul(rows, flipped, offsets, backend), row_by_row(rows, weight, offsets))
    grouped_matmul(rows.expand(8, 8), flipped, offsets, backend).sum().backward()  # an expanded gradient
    assert flipped.grad is not None
    assert flipped.grad.isfinite().all()


@each_backend
def test_experts_without_rows_get_a_zero_gradient(backend: str) -> None:
    for _ in range(5):  # uninitialised memory does not always hold numbers
        junk = torch.full((3, 16, 16), float("nan"))
        del junk
        rows, weight, offsets = case([0, 6, 0], 16, 16, torch.float32)
        grouped_matmul(rows, weight, offsets, backend).square().sum().backward()
        assert weight.grad is not None
        assert not weight.grad[[0, 2]].any()
        assert weight.grad[1].any()


@each_backend
def test_autocast_casts_like_matmul(backend: str) -> None:
    rows, weight, offsets = case([4, 2], 16, 8, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_matmul(rows, weight, offsets, backend)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("offsets", [[0, 2, 1, 6], [1, 2, 3, 6], [0, 2, 4, 5], [0, 2, 4, 99]], ids=str)
def test_offsets_that_lie_are_refused(offsets: list[int]) -> None:
    rows, weight, _ = case([2, 2, 2], 4, 4, torch.float32)
    with pytest.raises(ValueError, match="offsets must rise from 0 to 6"):
        grouped_matmul(rows, weight, torch.tensor(offsets))


def test_shapes_that_do_not_fit_are_refused() -> None:
    rows, weight, offsets = case([2, 2], 4, 4, torch.float32)
    with pytest.raises(ValueError, match="share the width"):
        grouped_matmul(rows[:, :3], weight, offsets)
    with pytest.raises(ValueError, match="2 experts need 3 offsets"):
        grouped_matmul(rows, weight, offsets[:2])
    with pytest.raises(ValueError, match="choose one of auto"):
        grouped_matmul(rows, weight, offsets, "fastest")


@pytest.mark.parametrize("backend", ["native", "rounded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_keep_the_rules_of_torch_library(backend: str, dtype: torch.dtype) -> None:
    rows, weight, offsets = case([2, 0, 3], 7, 5, dtype)
    grad = torch.randn(5, 5).to(dtype).requires_grad_()
    torch.library.opcheck(getattr(torch.ops.moestro, f"{backend}_product").default, (rows, weight, offsets))
    torch.library.opcheck(getattr(torch.ops.moestro, f"{backend}_outer").default, (rows, grad, offsets))


@each_backend
def test_gradgradcheck(backend: str) -> None:
    rows, weight, offsets = case([2, 0, 1], 2, 2, torch.float64)
    assert torch.autograd.gradgradcheck(lambda r, w: grouped_matmul(r, w, offsets, backend), (rows, weight))


def test_rounding_wastes_at_most_an_eighth_and_meets_few_shapes() -> None:
    sizes = [round_up(count) for count in range(1, 4097)]
    assert all(count <= size <= count * 9 / 8 for count, size in enumerate(sizes, 1))
    assert len(set(sizes)) == 16 + 8 * 8
