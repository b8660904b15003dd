"""How a model reads a text that grows: with a memory of what it has read, or from the start each time."""

from __future__ import annotations

import torch
from torch import Tensor

from moestro.inference.choose_steps import choose_steps
from moestro.inference.decoding import Decoder, suits_decoder
from moestro.models import DecoderLM, KeyValueCache


class CachedReader:
    """Reads only new tokens; keys and values of the earlier ones are kept.

    What comes first is read by the model itself; afterwards single tokens go through a `Decoder` where the model
    suits one.

    Args:
        model: in evaluation mode, and `cacheable`.
        max_length: tokens to make room for.
        domain: source or language of the text, for methods that route by it.

        steps: of the decoder: "torch", "compiled", or "auto" for the latter where it can be had.

    Raises:
        ValueError: compiled steps where there are none.

    Shapes: new tokens `[new]` -> logits after the last one `[vocab_size]`.
    """

    def __init__(self, model: DecoderLM, max_length: int, domain: int | None = None, steps: str = "auto") -> None:
        self.model, self.domain, self.steps = model, domain, choose_steps(steps)
        self.memory = model.new_cache(1, max_length)
        self.decoder: Decoder | None = None

    @torch.inference_mode()
    def __call__(self, tokens: Tensor) -> Tensor:
        if self.decoder is not None and len(tokens) == 1:
            return self.decoder(int(tokens))
        if self.decoder is not None:
            raise ValueError(f"{len(tokens)} tokens at once after the beginning; pass them one by one")
        logits = _read(self.model, tokens, self.domain, self.memory)
        if suits_decoder(self.model):
            self.decoder = Decoder(self.model, self.memory, self.domain, self.steps)
            del self.memory  # the decoder has its own
        return logits


class WholeReader:
    """Reads the whole text again with every new token; for routers that look at earlier ones.

    Shapes: new tokens `[new]` -> logits after the last one `[vocab_size]`.
    """

    def __init__(self, model: DecoderLM, domain: int | None = None) -> None:
        self.model, self.domain, self.tokens = model, domain, torch.empty(0, dtype=torch.long)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor) -> Tensor:
        self.tokens = torch.cat([self.tokens.to(tokens.device), tokens])
        return _read(self.model, self.tokens, self.domain, None)


def _read(model: DecoderLM, tokens: Tensor, domain: int | None, memory: KeyValueCache | None) -> Tensor:
    """Logits `[vocab_size]` after the last token; the head runs on that position alone."""
    sequence = tokens.unsqueeze(0)
    domains = None if domain is None else torch.full_like(sequence, domain)
    return model.head(model.hidden_states(sequence, cache=memory, domain=domains)[0, -1])
