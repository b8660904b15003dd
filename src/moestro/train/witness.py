"""Watches the last evaluation: who was routed where, for the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from moestro.balance import RoutingLog
from moestro.data import Batch, Corpus
from moestro.inspect import LayerTally, SpecialisationCounter


class Witness:
    """Counts the routing decisions of an evaluation.

    Args:
        log: of the evaluated model.
        corpus: whose text is evaluated.
    """

    def __init__(self, log: RoutingLog, corpus: Corpus):
        self.log, self.corpus = log, corpus
        self._likes = SpecialisationCounter(len(corpus.domains), corpus.tokenizer.vocab_size, log.layers)
        self._tallies = {name: LayerTally() for name in log.layers}

    @contextmanager
    def watching(self, batch: Batch) -> Iterator[None]:
        """Record what the model decides about a batch, and count it."""
        with self.log.recording():
            yield
        self._likes.add(self.log.decisions, batch.tokens, batch.domain)
        for name, decisions in self.log.decisions.items():
            for decision in decisions:
                self._tallies[name].add(decision)

    def add_up(self, summed: Callable[[Tensor], Tensor]) -> None:
        """Count what other processes watched, too; `summed` adds numbers up over all of them."""
        for counts in (self._likes.domain_counts, self._likes.token_counts):
            for name in self.log.layers:
                counts[name] = summed(counts[name])
        packed = {name: summed(tally.packed()) for name, tally in self._tallies.items()}
        self._tallies = {name: LayerTally.unpacked(numbers) for name, numbers in packed.items()}

    def result(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The content of specialisation.json, and what result.json says of it.

        `domains` are their names, `dead_experts` is the number in all layers, `smallest_share` the smallest
        share of a layer's tokens that one of its experts takes. One value per layer have
        `normalised_mutual_information`, of domain and expert, and `told_apart`, that is
        how often one choice gives the domain away.
        """
        likes = self._likes.result(self.corpus.domains, self.corpus.tokenizer)
        layers = [tally.result() for tally in self._tallies.values()]
        return likes, {
            "dead_experts": sum(layer["dead"] for layer in layers),
            "smallest_share": min(min(layer["load"]) * layer["experts_per_token"] for layer in layers),
            "normalised_mutual_information": [layer["normalised_mutual_information"] for layer in likes["layers"]],
            "domains": list(self.corpus.domains),
            "told_apart": [layer["told_apart"] for layer in likes["layers"]],
        }
