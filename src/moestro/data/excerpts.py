"""A small fair sample of a large text: excerpts of every domain, the same ones every time."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

import xxhash

from moestro.data.documents import Document


@dataclass(frozen=True)
class Excerpt:
    """A piece of a document, and the domain that it belongs to."""

    text: str
    domain: str


def sample_excerpts(documents: Iterable[Document], count: int, num_bytes: int, seed: int = 0) -> list[Excerpt]:
    """At most `count` excerpts, spread evenly over the domains, in the order of a seeded hash.

    Every document is cut into pieces of `num_bytes`; those of each domain with the smallest hash are taken, so that
    every piece of a domain is as likely as any other. Bytes that are no UTF-8 become U+FFFD.

    Args:
        documents: read once, one at a time.
        count: excerpts in all; every domain gets at least one.
        num_bytes: bytes of an excerpt.
        seed: of the choice.

    Raises:
        ValueError: no text.
    """
    kept: dict[str, list[tuple[int, bytes]]] = {}
    for document in documents:
        best, data = kept.setdefault(document.domain, []), document.data
        for start in range(0, len(data), num_bytes):
            piece = data[start : start + num_bytes]
            if start and len(piece) < num_bytes // 2:
                continue  # the rest of a document, too short to say much
            rank = xxhash.xxh3_64_intdigest(f"{document.name}:{start}".encode(), seed)
            heapq.heappush(best, (-rank, piece))
            if len(best) > count:
                heapq.heappop(best)
    if not kept:
        raise ValueError("there is no text to take excerpts from; give files that hold text")
    return _spread(kept, max(count, len(kept)))


def _spread(kept: dict[str, list[tuple[int, bytes]]], count: int) -> list[Excerpt]:
    """Turn about, the best of each domain first, until there are enough."""
    queues = {domain: sorted(pieces) for domain, pieces in kept.items()}  # the smallest hash last
    picked: list[Excerpt] = []
    while len(picked) < count and any(queues.values()):
        for domain, queue in queues.items():
            if queue and len(picked) < count:
                picked.append(Excerpt(queue.pop()[1].decode(errors="replace"), domain))
    return picked
