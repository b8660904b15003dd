"""How well a model predicts text, in bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TextBatch(Protocol):
    """What evaluation reads of a batch; `moestro.data.Batch` has it."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def targets(self) -> Tensor: ...
    @property
    def domain(self) -> Tensor: ...
    @property
    def num_bytes(self) -> int: ...


@dataclass(frozen=True)
class Evaluation:
    """What a model made of some text.

    Attributes:
        loss: mean cross-entropy of a token in nats.
        bits_per_byte: summed cross-entropy in bits over the bytes that the tokens stand for.
        accuracy: share of tokens that were the most likely one.
        num_tokens: tokens predicted.
        num_bytes: bytes that they stand for.
    """

    loss: float
    bits_per_byte: float
    accuracy: float
    num_tokens: int
    num_bytes: int

    @property
    def perplexity(self) -> float:
        """exp(loss), per token."""
        return math.exp(min(self.loss, 700.0))


def evaluate(
    model: nn.Module,
    batches: Iterable[TextBatch],
    *,
    num_batches: int | None = None,
    precision: torch.dtype | None = None,
    together: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Evaluation:
    """Predict every token of `batches` from those before it, in evaluation mode; the mode is restored.

        bits per byte = sum of -log2 p(target) / bytes of the targets

    Args:
        model: tokens and, by keyword, domain, both `[batch, length]` -> logits `[batch, length, vocab_size]`.
        batches: for example `moestro.data.Batches(file, batch_size, length, shuffle=False)`.
        num_batches: stop after so many; None = all.
        precision: dtype of autocast; None = the model's own.
        together: adds up numbers over the processes that predict a share of the batches each.

    Raises:
        ValueError: there is nothing to predict.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    try:
        for batch in islice(batches, num_batches):
            nll, hits = _score(model, batch, device, precision)
            counts = [float(hits), float(batch.targets.numel()), float(batch.num_bytes)]
            sums += torch.tensor([float(nll), *counts], dtype=torch.float64)
    finally:
        model.train(was_training)
    total, correct, num_tokens, num_bytes = together(sums).tolist()
    if not num_tokens or not num_bytes:
        raise ValueError("there is no text to evaluate on; pass at least one batch")
    bits = total / math.log(2)
    return Evaluation(total / num_tokens, bits / num_bytes, correct / num_tokens, int(num_tokens), int(num_bytes))


@torch.inference_mode()
def _score(
    model: nn.Module, batch: TextBatch, device: torch.device, precision: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy in nats and the number of tokens guessed right."""
    with autocast(device.type, precision):
        logits = model(batch.tokens.to(device), domain=batch.domain.to(device).long()).flatten(0, 1)
    targets = batch.targets.to(device).flatten()
    nll = F.cross_entropy(logits.float(), targets, reduction="sum")
    return nll.double(), (logits.argmax(-1) == targets).sum()


def autocast(device: str, precision: torch.dtype | None) -> AbstractContextManager[object]:
    """Autocast to `precision`; nothing when it is None, float32 or float64."""
    if precision in (None, torch.float32, torch.float64):
        return nullcontext()
    return torch.autocast(device, dtype=precision)
