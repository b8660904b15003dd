"""Generating text token by token, with a key-value cache."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from moestro.inference.choose_steps import choose_steps
from moestro.inference.readers import CachedReader, WholeReader
from moestro.inference.sampler import Sampler
from moestro.layers import MoE
from moestro.models import DecoderLM


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
    domain: int | None = None,
    steps: str = "auto",
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
        domain: source or language of the text; for methods that route by it.
        steps: of decoding: "torch", "compiled", or "auto" for the latter where it can be had; `plan_decoding` says
            what that comes to. Compiled steps take a while the first time on a machine, see `compile_steps`.

    Raises:
        ValueError: an empty prompt, ids outside the vocabulary, more tokens than the model has positions, a
            model that cannot generate, or compiled steps where there are none.
    """
    prompt = torch.as_tensor(tokens, dtype=torch.long, device=model.embedding.weight.device).flatten()
    _check(model, prompt, max_new_tokens)
    steps = choose_steps(steps)
    reader: CachedReader | WholeReader = WholeReader(model, domain)
    if cache and model.cacheable:
        reader = CachedReader(model, len(prompt) + max_new_tokens, domain, steps)
    return _stream(reader, prompt, max_new_tokens, Sampler(temperature, top_p, seed), frozenset(stop))


def _stream(
    reader: CachedReader | WholeReader, tokens: Tensor, count: int, sampler: Sampler, stop: frozenset[int]
) -> Iterator[int]:
    was_training = reader.model.training
    reader.model.eval()
    try:
        for _ in range(count):
            token = sampler(reader(tokens))
            if token in stop:
                return
            yield token
            tokens = tokens.new_tensor([token])
    finally:
        reader.model.train(was_training)


def check_generation(model: DecoderLM, sequences: int = 1) -> None:
    """Raise ValueError if a model cannot generate so many sequences at once.

    Routing must not look at later tokens in evaluation: methods such as BASE layers, Sinkhorn routing,
    mixture-of-depths, and expert choice with `predict`, have a causal rule of their own there. Several sequences
    at once must not change one another.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, MoE) and not layer.causal_evaluation:
            raise ValueError(
                f"{name} ({layer.method or 'a mixture'}) looks at later tokens, which do not exist yet while a "
                "text is generated; use a causal method, or one with a causal rule for evaluation"
            )
        if isinstance(layer, MoE) and sequences > 1 and not layer.batch_independent:
            raise ValueError(
                f"{name} ({layer.method or 'a mixture'}) routes {sequences} sequences together, so that they would "
                "change one another's text; generate them one by one"
            )


def _check(model: DecoderLM, prompt: Tensor, max_new_tokens: int) -> None:
    check_generation(model)
    if not len(prompt):
        raise ValueError("the prompt is empty; pass at least one token")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens}; pass 0 or more")
    unknown = prompt[(prompt < 0) | (prompt >= model.vocab_size)]
    if len(unknown):
        raise ValueError(
            f"the prompt holds token {int(unknown[0])} but the model knows ids 0 to {model.vocab_size - 1}; "
            "encode it with the model's own tokenizer"
        )
    if len(prompt) + max_new_tokens > model.max_length:
        raise ValueError(
            f"{len(prompt)} prompt tokens and {max_new_tokens} new ones exceed max_length={model.max_length}; "
            "shorten the prompt or lower max_new_tokens"
        )
