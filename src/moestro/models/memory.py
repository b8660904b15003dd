"""How many bytes a training step keeps for its backward pass, worked out from the shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moestro.experts import ConcatExperts, is_fused, is_gated, is_planned_on_device
from moestro.layers import MoE
from moestro.models.attend import SHORT
from moestro.models.attention import GroupedQueryAttention
from moestro.models.decoder import Attention, Block, DecoderLM
from moestro.models.latent import LatentAttention


@dataclass(frozen=True)
class Activations:
    """Bytes per token, for sequences of `length` tokens in a precision of `size` bytes.

    The residual stream, norms and routers are float32, whatever the precision.

    Attributes:
        dtype: of autocast; float32 = none.
        length: tokens in a sequence.
        device_type: where attention of short sequences writes its scores out, "cpu" (see `attend`), or not.
    """

    dtype: torch.dtype
    length: int
    device_type: str

    @property
    def size(self) -> int:
        """Bytes of a number under autocast."""
        return self.dtype.itemsize

    def model(self, model: DecoderLM) -> int:
        """Everything between embedding and head."""
        return sum(self.block(block) for block in model.blocks)

    def head(self, model: DecoderLM) -> int:
        """The last norm; logits, their log-softmax and its gradient."""
        return self.norm(model.embedding.embedding_dim) + model.vocab_size * (8 + self.size)

    def block(self, block: Block) -> int:
        width, count = block.width, sum(any(True for _ in norm.parameters()) for norm in block.norms)
        return count * self.norm(width) + self.attention(block.attention) + self.feed_forward(block, width)

    def norm(self, width: int) -> int:
        """Input and normalised input in float32, and the result as the next matrix product takes it."""
        return width * (8 + self.size)

    def attention(self, attention: Attention) -> int:
        if isinstance(attention, GroupedQueryAttention):
            return self.size * self._grouped_query(attention) + self._norm_of_queries(attention)
        return self.size * self._latent(attention) + 8 * (attention.kv_lora_rank + (attention.q_lora_rank or 0))

    @property
    def _scores_kept(self) -> bool:
        return self.device_type == "cpu" and self.size == 2 and self.length <= SHORT

    def _grouped_query(self, attention: GroupedQueryAttention) -> int:
        heads, kv_heads, dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
        used = dim * (2 * heads + 2 * kv_heads)  # rotated queries and keys, values, result
        if self._scores_kept:
            return used + heads * self.length
        return used + dim * (heads + kv_heads)  # values are a view that keeps the whole projection

    def _norm_of_queries(self, attention: GroupedQueryAttention) -> int:
        heads = attention.num_heads + attention.num_kv_heads
        return 0 if attention.qk_norm == "none" else heads * attention.head_dim * 8

    def _latent(self, attention: LatentAttention) -> int:
        heads, qk_dim = attention.num_heads, attention.nope_dim + attention.rope_dim
        latents = attention.kv_lora_rank + attention.rope_dim + (attention.q_lora_rank or 0)
        used = heads * (2 * qk_dim + max(qk_dim, attention.value_dim) + attention.value_dim)
        return latents + used + heads * (self.length if self._scores_kept else qk_dim)

    def feed_forward(self, block: Block, width: int) -> int:
        if block.ffn is not None:
            return self._hidden(block.ffn, width)
        moe = block.moe
        assert moe is not None
        shared = 0 if moe.shared is None else self._hidden(moe.shared, width)
        return round(self._routed(moe, width)) + shared + 16 * moe.router.num_experts  # logits, gate, sort, index

    def _routed(self, moe: MoE, width: int) -> float:
        """What the experts keep of a token: dispatched rows and hidden states, or if fused what they multiply."""
        if not (self.casts_by_expert(moe) or is_planned_on_device(moe.experts, self.device_type, self.dtype)):
            return moe.top_k * (self._hidden(moe.experts, width) + 2 * width * self.size)
        bank: Any = moe.experts
        states = 0 if bank.recompute else (2 if is_gated(bank.activation) else 1) * bank.hidden
        copy = width if self.size < 4 else 0
        return self.size * (moe.top_k * states + copy)

    def casts_by_expert(self, moe: MoE) -> bool:
        """Whether the CPU's fused operator runs the experts, which casts weights one expert at a time."""
        return is_fused(moe.experts, self.device_type)

    def _hidden(self, network: Any, width: int) -> int:
        """Hidden states of one gated or plain network; under autocast each of its inputs is a copy."""
        inner = getattr(network, "inner", network)
        if isinstance(inner, ConcatExperts):
            each = zip(inner.sizes, inner.banks, strict=True)
            return sum(size * self._hidden(bank, width) for size, bank in each) // inner.num_experts
        hidden: int = getattr(inner, "hidden", 0)  # trivial experts have no hidden states
        if not hidden:
            return 0
        if not is_gated(inner.activation):
            return self.size * 2 * hidden
        copies = width if self.size < 4 else 0
        return self.size * (4 * hidden + copies)
