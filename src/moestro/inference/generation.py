"""Generating text token by token, with a key-value cache."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from moestro.inference.sampler import Sampler
from moestro.models import DecoderLM, KeyValueCache


def generate(
    model: DecoderLM,
    tokens: Sequence[int] | Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    cache: bool = True,
    stop: Collection[int] = (),
) -> Iterator[int]:
    """Continue a prompt; tokens come as soon as they are known.

    The model generates in evaluation mode and gets its mode back at the end.

    Args:
        model: the language model.
        tokens: the prompt, at least one token.
        max_new_tokens: most tokens to generate.
        temperature: 0 = greedy.
        top_p: sample from the smallest set of tokens that holds this probability.
        seed: of the draws.
        cache: remember keys and values instead of computing them again, where routing allows it; the same tokens
            come out, except with methods that drop tokens over capacity: one new token at a time never exceeds it.
        stop: token ids that end the text; the one that did is not returned.

    Raises:
        ValueError: an empty prompt, ids outside the vocabulary, or more tokens than the model has positions.
    """
    prompt = torch.as_tensor(tokens, dtype=torch.long, device=model.embedding.weight.device).flatten()
    _check(model, prompt, max_new_tokens)
    sampler = Sampler(temperature, top_p, seed)
    return _stream(model, prompt[None], max_new_tokens, sampler, cache and model.cacheable, frozenset(stop))


def _stream(
    model: DecoderLM, tokens: Tensor, count: int, sampler: Sampler, use_cache: bool, stop: frozenset[int]
) -> Iterator[int]:
    was_training = model.training
    model.eval()
    memory = model.new_cache(1, tokens.shape[1] + count) if use_cache else None
    try:
        for _ in range(count):
            token = sampler(_next_logits(model, tokens, memory))
            if token in stop:
                return
            yield token
            new = tokens.new_tensor([[token]])
            tokens = new if use_cache else torch.cat([tokens, new], dim=1)
    finally:
        model.train(was_training)


@torch.inference_mode()
def _next_logits(model: DecoderLM, tokens: Tensor, memory: KeyValueCache | None) -> Tensor:
    """Logits `[vocab_size]` after the last token; the head runs on that position alone."""
    return model.head(model.hidden_states(tokens, cache=memory)[0, -1])


def _check(model: DecoderLM, prompt: Tensor, max_new_tokens: int) -> None:
    if not len(prompt):
        raise ValueError("the prompt is empty; pass at least one token")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens}; pass 0 or more")
    if prompt.min() < 0 or prompt.max() >= model.vocab_size:
        raise ValueError(
            f"the prompt holds token {int(prompt.max())} but the model knows ids 0 to {model.vocab_size - 1}; "
            "encode it with the model's own tokenizer"
        )
    if len(prompt) + max_new_tokens > model.max_length:
        raise ValueError(
            f"{len(prompt)} prompt tokens and {max_new_tokens} new ones exceed max_length={model.max_length}; "
            "shorten the prompt or lower max_new_tokens"
        )
