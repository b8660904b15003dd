"""What a training run will need, before it starts: parameters, FLOPs, memory, and speed by a short probe."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from moestro.balance import RoutingLog
from moestro.experts import is_gated
from moestro.models.attention import GroupedQueryAttention
from moestro.models.counts import ModelCounts
from moestro.models.decoder import Attention, Block, DecoderLM


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


def plan(model: DecoderLM, *, batch_size: int, length: int, precision: torch.dtype = torch.float32) -> Plan:
    """Work out what training `model` with AdamW needs; nothing is run.

    Args:
        model: may live on the meta device, where it takes no memory.
        batch_size: sequences in one pass.
        length: tokens in a sequence.
        precision: dtype of autocast; float32 = none.
    """
    counts = model.parameter_counts()
    tokens = batch_size * length
    weight_bytes = counts.total * model.embedding.weight.element_size()
    reduced = precision != torch.float32
    memory = {
        "weights": weight_bytes,
        "gradients": weight_bytes,
        "optimiser": 2 * weight_bytes,
        "casts": counts.total * precision.itemsize if reduced else 0,
        "activations": tokens * sum(_block_bytes(block, precision.itemsize) for block in model.blocks),
        "logits": tokens * _head_bytes(model, precision.itemsize),
    }
    return Plan(counts, model.flops_per_token(length), memory, tokens)


def _block_bytes(block: Block, size: int) -> int:
    """Bytes per token that one layer keeps for its backward pass; the residual stream is float32."""
    width = len(block.attention_norm.weight)
    # input and output of each norm; under autocast its output is kept in the reduced precision
    norms = 2 * width * (4 + size)
    return norms + size * _attention_entries(block.attention) + _feed_forward_bytes(block, width, size)


def _attention_entries(attention: Attention) -> int:
    heads = attention.num_heads
    if isinstance(attention, GroupedQueryAttention):
        kv_heads, dim = attention.num_kv_heads, attention.head_dim
        # projections (values are a view of them), rotated queries and keys, attended values
        return dim * (heads + 2 * kv_heads + heads + kv_heads + heads)
    qk_dim, value_dim = attention.nope_dim + attention.rope_dim, attention.value_dim
    latents = 2 * (attention.kv_lora_rank + attention.rope_dim) + 2 * (attention.q_lora_rank or 0)
    # queries, keys, padded values and their result, and the values cut out of it
    return latents + heads * (3 * qk_dim + max(qk_dim, value_dim) + value_dim)


def _feed_forward_bytes(block: Block, width: int, size: int) -> int:
    if block.ffn is not None:
        return size * _hidden_entries(block.ffn.hidden, block.ffn.activation)  # type: ignore[arg-type]
    moe = block.moe
    assert moe is not None
    per_choice = 2 * width + _hidden_entries(moe.experts.hidden, moe.experts.activation)  # type: ignore[arg-type]
    shared = getattr(moe.shared, "hidden", 0)
    entries = moe.top_k * per_choice + _hidden_entries(shared, moe.experts.activation)  # type: ignore[arg-type]
    return round(size * entries) + 4 * 4 * moe.router.num_experts  # logits, gate, sort: float32


def _hidden_entries(hidden: int, activation: str) -> int:
    """Gate, up, activated gate and product; or up and its activation."""
    return (4 if is_gated(activation) else 2) * hidden


def _head_bytes(model: DecoderLM, size: int) -> int:
    """Logits in both precisions, their log-softmax and its gradient."""
    return model.vocab_size * (8 + 2 * size) + len(model.norm.weight) * (4 + size)


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
    log = RoutingLog(model)
    device = model.embedding.weight.device
    seconds = []
    for _ in range(steps + 1):
        tokens = torch.randint(model.vocab_size, (batch_size, length), device=device)
        start = time.perf_counter()
        _training_step(model, tokens, optimiser, log, precision)
        seconds.append(time.perf_counter() - start)
    log.close()
    return batch_size * length / statistics.median(seconds[1:])


def _training_step(
    model: DecoderLM,
    tokens: torch.Tensor,
    optimiser: torch.optim.Optimizer,
    log: RoutingLog,
    precision: torch.dtype,
) -> None:
    with log.recording(), torch.autocast(tokens.device.type, precision, enabled=precision != torch.float32):
        logits = model(tokens)
    loss = F.cross_entropy(logits.float().flatten(0, 1), tokens.roll(-1, 1).flatten())
    (loss + log.auxiliary_loss()).backward()
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    log.update_controllers()
    if tokens.device.type == "cuda":
        torch.cuda.synchronize()
