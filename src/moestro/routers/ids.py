"""Ids that the context carries: asked for, checked, and harmless at padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.routing import Context


def ids_of(context: Context, field: str, count: int, who: str) -> Tensor:
    """One id per token, each from 0 to count - 1; padding may carry anything and reads 0.

    Args:
        context: of the call.
        field: name of the field, e.g. "domain".
        count: how many ids there are.
        who: who asks, for the message.

    Shapes: -> `[tokens]` int64.

    Raises:
        ValueError: the field is missing, or names an id that there is not.
    """
    ids = context.need(field, who).long()
    ids = ids if context.valid is None else ids.where(context.valid, 0)
    if can_check(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < count:
        outside = int(ids[(ids < 0) | (ids >= count)][0])
        raise ValueError(f"Context.{field} holds {outside} but {who} was built for {count}; pass 0 to {count - 1}")
    return ids


def can_check(ids: Tensor) -> bool:
    """Whether looking at the values is free: on a CPU, and not while a compiler traces."""
    return not torch.compiler.is_compiling() and ids.device.type == "cpu" and ids.numel() > 0


def by_domain(context: Context, num_keys: int) -> Tensor:
    """Key of a table = the token's domain: its source, language or task. `[tokens]`."""
    return ids_of(context, "domain", num_keys, "routing by domain")


@dataclass(frozen=True)
class ByDomainAndToken:
    """Key of a table = `domain * vocabulary + token id`: every domain reads a part of its own.

    Attributes:
        num_domains: parts of the table.
    """

    num_domains: int

    def __call__(self, context: Context, num_keys: int) -> Tensor:
        """Shapes: -> `[tokens]`."""
        vocab_size = num_keys // self.num_domains
        domain = ids_of(context, "domain", self.num_domains, "routing by domain and token")
        token_id = ids_of(context, "token_ids", vocab_size, "routing by domain and token")
        return domain * vocab_size + token_id
