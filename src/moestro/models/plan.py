"""What a training run will need, before it starts: parameters, FLOPs, memory, and speed by a short probe."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from moestro.balance import RoutingLog
from moestro.models.counts import ModelCounts
from moestro.models.decoder import DecoderLM
from moestro.models.memory import Activations


@dataclass(frozen=True)
class Plan:
    """The needs of a training step.

    Attributes:
        counts: parameters, total and active, by component.
        flops_per_token: of the forward pass; a training step takes three times as many.
        memory: peak bytes by component: weights, gradients, optimiser, casts, activations, logits.
        tokens_per_step: tokens in one pass (a micro-batch, when gradients are accumulated).
    """

    counts: ModelCounts
    flops_per_token: int
    memory: dict[str, int]
    tokens_per_step: int

    @property
    def peak_memory(self) -> int:
        """Bytes of tensors at the fullest moment of a step; the program itself comes on top."""
        return sum(self.memory.values())

    def fits(self, available: int) -> bool:
        """Whether a step fits into `available` bytes, with a tenth kept free."""
        return self.peak_memory <= 0.9 * available

    def seconds(self, num_tokens: int, tokens_per_second: float) -> float:
        """Time to train on `num_tokens` tokens."""
        return num_tokens / tokens_per_second


def plan(
    model: DecoderLM,
    *,
    batch_size: int,
    length: int,
    precision: torch.dtype = torch.float32,
    device: str | None = None,
) -> Plan:
    """Work out what training `model` with AdamW needs; nothing is run.

    Args:
        model: may live on the meta device, where it takes no memory.
        batch_size: sequences in one pass.
        length: tokens in a sequence.
        precision: dtype of autocast; float32 = none.
        device: where it will train, cpu or cuda; None = where the model is.
    """
    counts, tokens = model.parameter_counts(), batch_size * length
    weight = model.embedding.weight
    on_cpu = (device or weight.device.type).split(":")[0] == "cpu"
    activations = Activations(precision.itemsize, length, on_cpu)
    weight_bytes = counts.total * weight.element_size()
    memory = {
        "weights": weight_bytes,
        "gradients": weight_bytes,
        "optimiser": 2 * weight_bytes,
        "casts": counts.total * precision.itemsize if precision != torch.float32 else 0,
        "activations": tokens * activations.model(model),
        "logits": tokens * activations.head(model),
    }
    return Plan(counts, model.flops_per_token(length), memory, tokens)


def probe(
    model: DecoderLM,
    *,
    batch_size: int,
    length: int,
    precision: torch.dtype = torch.float32,
    steps: int = 3,
) -> float:
    """Tokens per second of a whole training step on random tokens: the median of `steps` after one to warm up.

    The steps train the model; pass one that you can throw away.
    """
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    device = model.embedding.weight.device
    seconds = []
    with _routing_log(model) as log:
        for _ in range(steps + 1):
            tokens = torch.randint(model.vocab_size, (batch_size, length), device=device)
            start = time.perf_counter()
            _training_step(model, tokens, optimiser, log, precision)
            seconds.append(time.perf_counter() - start)
    return batch_size * length / statistics.median(seconds[1:])


@contextlib.contextmanager
def _routing_log(model: DecoderLM) -> Iterator[RoutingLog | None]:
    """A log while the block runs; None for a dense model, which has nothing to record."""
    if all(block.moe is None for block in model.blocks):
        yield None
        return
    log = RoutingLog(model)
    try:
        yield log
    finally:
        log.close()


def _training_step(
    model: DecoderLM,
    tokens: torch.Tensor,
    optimiser: torch.optim.Optimizer,
    log: RoutingLog | None,
    precision: torch.dtype,
) -> None:
    recording = log.recording() if log else contextlib.nullcontext()
    with recording, torch.autocast(tokens.device.type, precision, enabled=precision != torch.float32):
        logits = model(tokens)
    loss = F.cross_entropy(logits.float().flatten(0, 1), tokens.roll(-1, 1).flatten())
    (loss + log.auxiliary_loss() if log else loss).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    if log:
        log.update_controllers()
    if tokens.device.type == "cuda":
        torch.cuda.synchronize()
