"""Excerpts of a text as batches of token ids, padded at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.data.excerpts import Excerpt
from moestro.hf.pieces import StockTokenizer


@dataclass(frozen=True, eq=False)
class Windows:
    """Sequences of token ids.

    Attributes:
        tokens: `[windows, length]` int64.
        valid: False for padding, `[windows, length]`.
        counted: tokens of the text itself, without those that the tokenizer puts in front, `[windows, length]`.
        domain: number of each window's domain, `[windows]`.
        domains: their names.
        ids: the different token ids that occur, `[ids]`, sorted.
    """

    tokens: Tensor
    valid: Tensor
    counted: Tensor
    domain: Tensor
    domains: tuple[str, ...]
    ids: Tensor

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Tokens, valid, counted and the domain of every token, `[size, length]` each."""
        domain = self.domain.unsqueeze(1).expand_as(self.tokens)
        parts = [each.split(size) for each in (self.tokens, self.valid, self.counted, domain)]
        yield from zip(*parts, strict=True)

    def rank(self, tokens: Tensor) -> Tensor:
        """Token ids as their place in `ids`, so that tables need no row for ids that do not occur."""
        return torch.searchsorted(self.ids, tokens)


def cut_windows(excerpts: Sequence[Excerpt], tokenizer: StockTokenizer, length: int, vocab_size: int) -> Windows:
    """One window of each excerpt.

    Args:
        excerpts: at least one.
        tokenizer: of the model.
        length: tokens of a window.
        vocab_size: token ids that the model knows.

    Raises:
        ValueError: a token id that the model does not have, or no room for a token of the text.
    """
    front = tokenizer.start
    if len(front) >= length:
        raise ValueError(f"length={length}, but the tokenizer puts {len(front)} tokens in front; pass more")
    rows = [front + tokenizer.encode(excerpt.text)[: length - len(front)] for excerpt in excerpts]
    tokens, valid = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length).bool()
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = torch.tensor(row, dtype=torch.long)
        valid[number, : len(row)] = True
    if int(tokens.max()) >= vocab_size:
        raise ValueError(f"the tokenizer gives id {int(tokens.max())}, but the model has {vocab_size} ids")
    counted = valid.clone()
    counted[:, : len(front)] = False
    domains = tuple(dict.fromkeys(excerpt.domain for excerpt in excerpts))
    domain = torch.tensor([domains.index(excerpt.domain) for excerpt in excerpts])
    return Windows(tokens, valid, counted, domain, domains, tokens.unique())


@dataclass(frozen=True)
class RankedTokenizer:
    """Reads ranks among the ids that occur as the tokenizer reads the ids.

    Attributes:
        windows: whose ids.
        tokenizer: of the model.
    """

    windows: Windows
    tokenizer: StockTokenizer

    def decode_bytes(self, ranks: Sequence[int]) -> bytes:
        return self.tokenizer.decode_bytes(int(self.windows.ids[rank]) for rank in ranks)
