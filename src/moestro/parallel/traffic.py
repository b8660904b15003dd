"""What crossed the wire: bytes and messages, by what was sent, when, and over which kind of link."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

Link = Literal["self", "intra", "inter"]
Phase = Literal["forward", "backward", "recompute", "trial"]
LINKS: tuple[Link, ...] = get_args(Link)


@dataclass
class Traffic:
    """Counts what this rank sends; every collective of the transports passes through it.

    A link is `self` (what a rank keeps), `intra` (to a rank of the same node) or `inter` (to another node). What an
    activation-checkpointed layer sends again is `recompute`, so that `forward` is exact with and without it; what a
    transport sends to learn how long it takes is `trial`.

    Attributes:
        sent: bytes by (name, phase, link).
        messages: number of non-empty messages, likewise.
    """

    sent: Counter[tuple[str, Phase, Link]] = field(default_factory=Counter)
    messages: Counter[tuple[str, Phase, Link]] = field(default_factory=Counter)
    _all_as: Phase | None = None

    def add(self, name: str, phase: Phase, sizes: Sequence[int], links: Sequence[Link]) -> None:
        """Count messages of `sizes` bytes over `links`."""
        phase = self._all_as or phase
        for size, link in zip(sizes, links, strict=True):
            if size:
                self.sent[name, phase, link] += size
                self.messages[name, phase, link] += 1

    def bytes(self, name: str | None = None, phase: Phase | None = None, link: Link | None = None) -> int:
        """Bytes sent; None = all names, phases, or links (also `self`)."""
        return _sum(self.sent, (name, phase, link))

    def number(self, name: str | None = None, phase: Phase | None = None, link: Link | None = None) -> int:
        """Messages sent; None = all names, phases, or links (also `self`)."""
        return _sum(self.messages, (name, phase, link))

    @contextmanager
    def as_trial(self) -> Iterator[None]:
        """Count what is sent meanwhile as `trial`, there and back."""
        before, self._all_as = self._all_as, "trial"
        try:
            yield
        finally:
            self._all_as = before

    def clear(self) -> None:
        """Start again from zero."""
        self.sent.clear()
        self.messages.clear()


def forward_phase() -> Phase:
    """`forward`, or `recompute` inside a backward pass, where activation checkpointing runs it again."""
    return "forward" if torch._C._current_graph_task_id() == -1 else "recompute"


def _sum(counter: Counter[tuple[str, Phase, Link]], wanted: tuple[str | None, ...]) -> int:
    return sum(n for key, n in counter.items() if all(w in (None, k) for w, k in zip(wanted, key, strict=True)))
