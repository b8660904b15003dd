"""Choosing follows a stable sort, however it is computed."""

import pytest
import torch

from moestro.routing import top_k


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "num_experts"), [(1, 8), (40, 64), (500, 3), (64, 513), (0, 16)])
def test_top_k_is_a_stable_sort(tokens: int, num_experts: int, dtype: torch.dtype) -> None:
    scores = (torch.randn(tokens, num_experts) * 3).round().to(dtype)  # many ties
    if tokens:
        scores[0, :3] = torch.tensor([-0.0, 0.0, -0.0], dtype=dtype)
        scores[-1, 1:3] = torch.tensor([torch.inf, -torch.inf], dtype=dtype)
        scores[-1, 0] = torch.nan
        scores[tokens // 2] = 1.0
    expected = scores.sort(dim=-1, descending=True, stable=True).indices
    for k in {1, 2, min(8, num_experts), num_experts}:
        assert torch.equal(top_k(scores, k), expected[:, :k])


def test_a_negative_nan_is_as_large_as_any() -> None:
    scores = torch.zeros(100, 16)
    scores[:, 5], scores[:, 9] = torch.nan, -torch.tensor(torch.nan)
    assert top_k(scores, 3)[0].tolist() == [5, 9, 0]


def test_more_choices_than_experts_are_as_many_as_there_are() -> None:
    assert top_k(torch.rand(3, 4), 6).shape == (3, 4)
    assert top_k(torch.rand(300, 4), 6).shape == (300, 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_experts_that_are_ruled_out_are_each_chosen_once(dtype: torch.dtype) -> None:
    scores = torch.rand(100, 32, dtype=dtype)
    scores[7, :] = -torch.inf
    scores[8, 4:] = -torch.inf
    expected = scores.sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(top_k(scores, 8), expected[:, :8])
    assert top_k(scores, 8)[7].tolist() == list(range(8))
