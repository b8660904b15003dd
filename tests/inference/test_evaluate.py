"""Bits per byte, against closed forms."""

import math
from types import SimpleNamespace

import pytest
import torch
from oracles.tiny_models import tiny_model
from torch import nn

from moestro.inference import evaluate


class Fixed(nn.Module):
    """The same logits everywhere."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, tokens, domain):
        return self.logits.expand(*tokens.shape, -1)


def batch(targets, num_bytes):
    targets = torch.tensor([targets])
    zeros = torch.zeros_like(targets)
    return SimpleNamespace(tokens=zeros, targets=targets, domain=zeros, num_bytes=num_bytes)


def test_an_even_guess_over_256_bytes_costs_8_bits():
    result = evaluate(Fixed(torch.zeros(256)), [batch([1, 2, 3], 3)])
    assert result.bits_per_byte == pytest.approx(8)
    assert result.loss == pytest.approx(math.log(256))
    assert result.perplexity == pytest.approx(256)


def test_sums_run_over_batches_of_different_sizes_before_dividing():
    probs = torch.tensor([0.5, 0.25, 0.25])
    result = evaluate(Fixed(probs.log()), [batch([0, 0, 1], 6), batch([2], 2)])
    assert result.bits_per_byte == pytest.approx((1 + 1 + 2 + 2) / 8)
    assert (result.num_tokens, result.num_bytes, result.accuracy) == (4, 8, 0.5)


def test_the_number_of_batches_can_be_limited_and_nothing_is_refused():
    batches = [batch([0], 1), batch([1, 1], 2)]
    assert evaluate(Fixed(torch.zeros(4)), batches, num_batches=1).num_tokens == 1
    with pytest.raises(ValueError, match="no text to evaluate on"):
        evaluate(Fixed(torch.zeros(4)), [])


def test_the_mode_comes_back_and_gradients_stay_out():
    model = tiny_model().train()
    evaluate(model, [batch([1, 2, 3], 3)])
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_autocast_changes_little():
    model, text = tiny_model(), [batch(list(range(30)), 30)]
    exact, reduced = evaluate(model, text), evaluate(model, text, precision=torch.bfloat16)
    assert reduced.loss == pytest.approx(exact.loss, rel=0.02)
    assert reduced.loss != exact.loss
