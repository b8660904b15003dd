"""Routing by a table that was fixed before training: nothing is learned."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moestro.routers.base import Router, context_notes
from moestro.routers.ids import can_check
from moestro.routing import Context, Decision, SparseRouting

Keys = Callable[[Context, int], Tensor]


class HashRouter(Router):
    """Looks experts up in tables, by the token's id, its predecessor's or its position.

        y_t = sum_n f_{h_n(key_t)}(x_t)        Roller et al. 2021, section 3; one table = one expert per token

    Args:
        tables: expert of each key, `[tables, keys]` int64; saved with the weights.
        num_experts: experts that a table chooses among; table n uses experts n E to n E + E - 1.
        keys: Context and number of keys -> key of each token, `[tokens]`.

    Raises:
        ValueError: a table that names an expert there is not, or a key outside the table.
    """

    tables: Tensor

    def __init__(self, tables: Tensor, num_experts: int, keys: Keys) -> None:
        super().__init__()
        if can_check(tables) and not 0 <= int(tables.min()) <= int(tables.max()) < num_experts:
            raise ValueError(f"the table must name experts 0 to {num_experts - 1}, got {int(tables.max())}")
        self.register_buffer("tables", tables.long())
        self.keys = keys
        self.needs_history = keys in (by_previous, by_bigram)
        self.num_experts = num_experts * len(tables)
        self.top_k = len(tables)

    def decide(self, x: Tensor, context: Context) -> Decision:
        num_tables, num_keys = self.tables.shape
        key = self.keys(context, num_keys)
        valid = context.valid
        key = key if valid is None else key.where(valid, 0)  # padding may carry any id
        self._check(key, num_keys)
        first = torch.arange(num_tables, device=x.device) * (self.num_experts // num_tables)
        index = self.tables[:, key].t() + first  # [tokens, tables]
        keep = None if valid is None else valid.unsqueeze(1).expand_as(index)
        weight = torch.ones_like(index, dtype=x.dtype)
        routing = SparseRouting.from_choice(index, weight, self.num_experts, keep)
        notes = {**context_notes(context), "choice": index}
        if keep is not None:
            notes["kept"] = keep
        return Decision(routing, notes=notes)

    def _check(self, key: Tensor, num_keys: int) -> None:
        if can_check(key) and not 0 <= int(key.min()) <= int(key.max()) < num_keys:
            outside = key[(key < 0) | (key >= num_keys)][0]
            raise ValueError(
                f"token id {int(outside)} is outside the hash table of {num_keys} entries; "
                f"build the method with vocab_size above the largest id"
            )

    def extra_repr(self) -> str:
        keys = getattr(self.keys, "__name__", repr(self.keys))
        return f"tables={len(self.tables)}, keys={keys}, num_experts={self.num_experts}"


def by_token(context: Context, num_keys: int) -> Tensor:
    """Key = the token's own id."""
    return context.need("token_ids", "hash routing by token")


def by_previous(context: Context, num_keys: int) -> Tensor:
    """Key = the id of the token before; the first of a sequence has the last key of the table."""
    token_ids = context.need("token_ids", "hash routing by the previous token")
    previous = token_ids.roll(1)
    return previous.masked_fill(_starts(context, token_ids), num_keys - 1)


def by_bigram(context: Context, num_keys: int) -> Tensor:
    """Key = a mixing hash of the token's id and the one before, modulo the table."""
    token_ids = context.need("token_ids", "hash routing by bigram")
    previous = token_ids.roll(1).masked_fill(_starts(context, token_ids), -1) + 1
    return mix(previous, token_ids) % num_keys


def by_position(context: Context, num_keys: int) -> Tensor:
    """Key = the token's position in its sequence, modulo the table."""
    return context.need("position", "hash routing by position") % num_keys


def mix(first: Tensor, second: Tensor) -> Tensor:
    """A mixing hash of two integers, element by element: 0 to 2^32 - 1, alike on every machine."""
    mixed = (first * 0x9E3779B1 + second * 0x85EBCA77) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    return mixed ^ (mixed >> 15)


def _starts(context: Context, token_ids: Tensor) -> Tensor:
    """Which tokens begin a sequence, `[tokens]` bool."""
    starts = torch.zeros_like(token_ids, dtype=torch.bool)
    starts[:1] = True
    if context.sequence is not None:
        starts[1:] = context.sequence.diff() != 0
    return starts
