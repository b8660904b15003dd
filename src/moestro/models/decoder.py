"""The decoder language model: embedding, blocks of attention and feed-forward, norm, head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moestro.layers import MoE
from moestro.models.attention import GroupedQueryAttention
from moestro.models.cache import KeyValueCache, LayerCache
from moestro.models.counts import ModelCounts, count_flops_per_token, count_parameters
from moestro.models.latent import LatentAttention
from moestro.models.norm import NORMS, times
from moestro.models.rotary import Rotary
from moestro.routing import Context, Decision

Attention = GroupedQueryAttention | LatentAttention


class Block(nn.Module):
    """One layer of attention and one feed-forward network, each beside the residual stream.

        x = x + after(attention(norm(x))),   x = x + after(feed_forward(norm(x)))

    The feed-forward network is called `moe` if it is a mixture of experts, `ffn` if it is dense; the other is None.
    A list of `decisions` gets that of the mixture appended.

    Args:
        attention: mixes positions.
        feed_forward: acts on each.
        width: model width.
        eps: of the norms.
        norm: `rms` or `layer`.
        norm_place: `before` each network as usual, `after` it (OLMo 2, 2024), or `both`.
        residual_scale: what each network's result is multiplied with, where no norm follows it.

    Shapes: x `[batch, length, width]` -> the same.
    """

    moe: MoE | None
    ffn: nn.Module | None

    def __init__(
        self,
        attention: Attention,
        feed_forward: nn.Module,
        width: int,
        eps: float,
        norm: str = "rms",
        norm_place: str = "before",
        residual_scale: float = 1.0,
    ):
        super().__init__()

        def before() -> nn.Module:
            return nn.Identity() if norm_place == "after" else NORMS[norm](width, eps)

        def after() -> nn.Module:
            return times(residual_scale) if norm_place == "before" else NORMS[norm](width, eps)

        self.width = width
        self.attention_norm, self.attention, self.attention_after = before(), attention, after()
        self.ffn_norm, self.ffn_after = before(), after()
        self.moe = feed_forward if isinstance(feed_forward, MoE) else None
        self.ffn = feed_forward if self.moe is None else None

    @property
    def norms(self) -> tuple[nn.Module, ...]:
        """What stands before and after attention and feed-forward network; nothing in some places."""
        return self.attention_norm, self.attention_after, self.ffn_norm, self.ffn_after

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        context: Context | None = None,
        cache: LayerCache | None = None,
        decisions: list[Decision] | None = None,
    ) -> Tensor:
        x = x + self.attention_after(self.attention(self.attention_norm(x), rotary, mask, cache))
        return x + self.ffn_after(self.feed_forward(self.ffn_norm(x), context, decisions))

    def feed_forward(self, x: Tensor, context: Context | None, decisions: list[Decision] | None = None) -> Tensor:
        if self.moe is not None:
            return self.moe(x, context, decisions)
        assert self.ffn is not None
        return self.ffn(x)


class DecoderLM(nn.Module):
    """A causal language model over blocks that are dense or mixtures of experts; made by `build_language_model`.

    Args:
        vocab_size: token ids.
        blocks: the layers, from the input up.
        width: model width.
        max_length: most positions in a sequence.
        rope_theta: base of the rotary positions.
        eps: of the last norm.
        tied_embeddings: one matrix for input and output embeddings.
        rope_scaling: of those positions, see `rotary_frequencies`.
        norm: `rms` or `layer`.
        head_bias: whether the head adds one.
        embedding_scale: what embeddings are multiplied with.
        logit_scale: what logits are multiplied with (the states under the head are, which is the same).
        config: the arguments that rebuild this model with `build_language_model(**config)`.

    Shapes: tokens `[batch, length]` int64 -> logits `[batch, length, vocab_size]`.
    """

    def __init__(
        self,
        vocab_size: int,
        blocks: Sequence[Block],
        width: int,
        *,
        max_length: int,
        rope_theta: float,
        eps: float,
        tied_embeddings: bool,
        config: Mapping[str, Any],
        rope_scaling: Mapping[str, Any] | None = None,
        norm: str = "rms",
        head_bias: bool = False,
        embedding_scale: float = 1.0,
        logit_scale: float = 1.0,
    ):
        super().__init__()
        self.max_length, self.config = max_length, dict(config)
        self.embedding = nn.Embedding(vocab_size, width)
        self.rotary = Rotary(blocks[0].attention.rotary_dim, max_length, rope_theta, rope_scaling)
        self.layers = nn.ModuleList(blocks)
        self.norm = NORMS[norm](width, eps)
        self.head = nn.Linear(width, vocab_size, bias=head_bias)
        self.embedding_scale, self.logit_scale = times(embedding_scale), times(logit_scale)
        if tied_embeddings:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        tokens: Tensor,
        valid: Tensor | None = None,
        cache: KeyValueCache | None = None,
        domain: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token at every position.

        Args:
            tokens: `[batch, length]` int64.
            valid: False for padding, `[batch, length]` bool; None = all valid.
            cache: what earlier calls stored; the new tokens follow it and are stored too.
            domain: source or language of every token, `[batch, length]` int; for methods that route by it.
        """
        return self.head(self.hidden_states(tokens, valid, cache, domain))

    def hidden_states(
        self,
        tokens: Tensor,
        valid: Tensor | None = None,
        cache: KeyValueCache | None = None,
        domain: Tensor | None = None,
    ) -> Tensor:
        """The states under the head, normalised and scaled, `[batch, length, width]`."""
        start = 0 if cache is None else cache.length
        self._check(tokens, start, valid, cache)
        rotary = self.rotary(start, tokens.shape[1])
        mask = _attention_mask(tokens, start, valid)
        context = _context(tokens, start, valid, domain)
        decisions: list[Decision] = []
        x = self.embedding_scale(self.embedding(tokens))
        for index, layer in enumerate(self.layers):
            x = layer(x, rotary, mask, context, None if cache is None else cache.layers[index], decisions)
            if decisions:  # some routers read what the mixture before them decided
                context = replace(context, previous=decisions.pop())
        return self.logit_scale(self.norm(x))

    def new_cache(self, batch: int, max_length: int | None = None) -> KeyValueCache:
        """An empty key-value cache for `batch` sequences, in the dtype of the weights."""
        shapes = [layer.attention.cache_shapes() for layer in self.blocks]
        weight = self.embedding.weight
        return KeyValueCache(shapes, batch, max_length or self.max_length, weight.dtype, weight.device)

    @property
    def blocks(self) -> list[Block]:
        return [layer for layer in self.layers if isinstance(layer, Block)]

    @property
    def vocab_size(self) -> int:
        return self.embedding.num_embeddings

    @property
    def batch_independent(self) -> bool:
        """Whether the tokens of one sequence never depend on the other sequences of the batch."""
        return all(block.moe is None or block.moe.batch_independent for block in self.blocks)

    @property
    def cacheable(self) -> bool:
        """Whether new tokens need no more of earlier ones than keys and values; routers may look at earlier ids."""
        return not any(block.moe.router.needs_history for block in self.blocks if block.moe is not None)

    def parameter_counts(self) -> ModelCounts:
        """Parameters: all of them, those that one token uses, and by component."""
        return count_parameters(self)

    def flops_per_token(self, length: int) -> int:
        """FLOPs of the forward pass per token in sequences of `length` tokens; see `count_flops_per_token`."""
        return count_flops_per_token(self, length)

    def dense_twin(self, seed: int | None = None) -> DecoderLM:
        """A dense model with as many parameters as one token uses in this one; see `build_dense_twin`."""
        from moestro.models.twin import build_dense_twin  # twin builds models, so it imports this module

        return build_dense_twin(self, seed)

    def _check(self, tokens: Tensor, start: int, valid: Tensor | None, cache: KeyValueCache | None) -> None:
        if tokens.dim() != 2:
            raise ValueError(f"tokens have shape {list(tokens.shape)}; pass [batch, length]")
        end = start + tokens.shape[1]
        if end > self.max_length:
            raise ValueError(
                f"the sequence reaches {end} tokens but this model takes max_length={self.max_length}; "
                "shorten it or build the model with a larger max_length"
            )
        if valid is not None and cache is not None:
            raise ValueError("padding cannot be combined with a cache; generate sequences of one length together")
        if cache is not None and end > cache.max_length:
            raise ValueError(
                f"the cache has room for {cache.max_length} tokens but {end} are needed; make a longer one"
            )


def _attention_mask(tokens: Tensor, start: int, valid: Tensor | None) -> Tensor | None:
    """True where a query may look, `[batch or 1, 1, length, start + length]`; None = plain causal attention."""
    length = tokens.shape[1]
    if valid is None and (start == 0 or length == 1):
        return None
    causal = torch.ones(length, start + length, dtype=torch.bool, device=tokens.device).tril(start)[None, None]
    if valid is None:
        return causal
    # a padded query sees at least itself: a row without any key is NaN in some kernels
    itself = torch.eye(length, dtype=torch.bool, device=tokens.device)
    return causal & (valid[:, None, None, :] | itself)


def _context(tokens: Tensor, start: int, valid: Tensor | None, domain: Tensor | None) -> Context:
    batch, length = tokens.shape
    row = torch.arange(batch, device=tokens.device)
    return Context(
        token_ids=tokens.flatten(),
        sequence=row.repeat_interleave(length),
        position=_positions(tokens, start, valid).flatten(),
        valid=None if valid is None else valid.flatten(),
        domain=None if domain is None else domain.flatten(),
    )


def _positions(tokens: Tensor, start: int, valid: Tensor | None) -> Tensor:
    """Place of every token in its sequence, not counting padding, `[batch, length]`."""
    if valid is not None:
        return (valid.cumsum(1) - 1).clamp(min=0)
    return torch.arange(start, start + tokens.shape[1], device=tokens.device).expand_as(tokens)
