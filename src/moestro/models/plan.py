"""What a training run will need, before it starts: parameters, FLOPs and memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
    device_type = (device or weight.device.type).split(":")[0]
    size, activations = precision.itemsize, Activations(precision, length, device_type)
    weight_bytes = counts.total * weight.element_size()
    memory = {
        "weights": weight_bytes,
        "gradients": weight_bytes,
        "optimiser": 2 * weight_bytes,
        "casts": (counts.total - _cast_in_place(model, activations)) * size if size < 4 else 0,
        "activations": tokens * activations.model(model),
        "logits": tokens * activations.head(model),
    }
    return Plan(counts, model.flops_per_token(length), memory, tokens)


def _cast_in_place(model: DecoderLM, activations: Activations) -> int:
    """Parameters that are never cast as a whole: those of experts that are fused on a CPU."""
    moes = [block.moe for block in model.blocks if block.moe is not None and activations.casts_by_expert(block.moe)]
    return sum(p.numel() for moe in moes for p in moe.experts.parameters())
