"""What a transport is, and the table of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from moestro.parallel.network import Network, Trip


class Transport(ABC):
    """Brings rows to the ranks that hold their experts, has them computed there, and brings the results home.

    A transport changes what crosses which link, and when, never what comes out.

    Attributes:
        drops_copies: whether only one of the ranks that hold the same tokens sends each of their rows.
    """

    drops_copies = False

    def check(self, network: Network, experts: nn.Module) -> None:  # noqa: B027
        """Raise ValueError if this transport cannot serve these experts there; called when a layer is built."""

    @abstractmethod
    def carry(self, trip: Trip, rows: Tensor, load: Tensor) -> Tensor:
        """Rows through their experts.

        Shapes: rows `[rows, width]` grouped by rank and slot, load `[ranks, slots]` -> `[rows, out_width]`, the
            rows in the order in which they came.
        """

    def state(self) -> dict[str, Tensor]:
        """What it has learned that decides how it computes, for a checkpoint; as many names on every rank."""
        return {}

    def take(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Go on with what one like it had learned; what does not fit here is left."""


class TokenTransport(Transport):
    """A transport that knows which rows are of one token, and sends a token once where it may."""

    @abstractmethod
    def carry_tokens(
        self, trip: Trip, x: Tensor, token: Tensor, weight: Tensor, load: Tensor, scale: str
    ) -> Tensor:
        """`y = C F(D x)` of a sparse routing.

        Shapes: x `[tokens, width]`; token and weight `[pairs]` grouped by rank and slot; load `[ranks, slots]` ->
            `[tokens, out_width]`.
        """

    def carry(self, trip: Trip, rows: Tensor, load: Tensor) -> Tensor:
        every = torch.arange(len(rows), device=rows.device)
        return self.carry_tokens(trip, rows, every, rows.new_ones(len(rows)), load, "output")


T = TypeVar("T", bound=Callable[[], Transport])
_TRANSPORTS: dict[str, Callable[[], Transport]] = {}


def transport(name: str) -> Callable[[T], T]:
    """Register a transport (what makes one with its defaults) under a name."""

    def register(make: T) -> T:
        _TRANSPORTS[name] = make
        return make

    return register


def all_transports() -> tuple[str, ...]:
    """Names that `make_transport` accepts."""
    return tuple(_TRANSPORTS)


def make_transport(transport: str | Transport) -> Transport:
    """The transport of a name, or the transport itself; ValueError naming those there are."""
    if isinstance(transport, Transport):
        return transport
    if transport not in _TRANSPORTS:
        raise ValueError(f"unknown transport {transport!r}; choose one of {', '.join(_TRANSPORTS)}")
    return _TRANSPORTS[transport]()
