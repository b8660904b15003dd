"""Everything that can be said about the routing of a model that runs over a text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moestro.inspect.chosen import busiest, coactivation, coverage, experts_for, next_layer, together, top_pairs
from moestro.inspect.dead import dead_experts
from moestro.inspect.health import RouterTally, router_findings
from moestro.inspect.history import layer_labels
from moestro.inspect.similarity import MOST, cosines, output_cosines, rounded, similarity
from moestro.inspect.specialisation import SpecialisationCounter
from moestro.inspect.statistics import LayerTally, chosen_matrix
from moestro.routing import Decision, SparseRouting


class Survey:
    """Collects decisions batch by batch and says what the experts of every layer do.

        survey = Survey(log.layers, num_domains, vocab_size)
        with log.recording():
            model(tokens)
        survey.add(log.decisions, tokens, domain)
        found = survey.result(domains, tokenizer)

    Memory: one byte per token, layer and expert, and 8 bytes per token id, layer and expert.

    Args:
        layers: names of the mixture layers in model order.
        num_domains: kinds of text.
        vocab_size: token ids.
    """

    def __init__(self, layers: Sequence[str], num_domains: int, vocab_size: int) -> None:
        self.layers = list(layers)
        self._likes = SpecialisationCounter(num_domains, vocab_size, self.layers)
        self._tallies = {name: LayerTally() for name in self.layers}
        self._routers = {name: RouterTally() for name in self.layers}
        self._chosen: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        self._similar: dict[str, dict[str, Tensor]] = {name: {} for name in self.layers}

    def add(self, decisions: Mapping[str, Decision | Iterable[Decision]], tokens: Tensor, domain: Tensor) -> None:
        """Add a batch.

        Args:
            decisions: by layer name, as a log has them.
            tokens, domain: token id and domain of every routed token, `[tokens]` or `[batch, length]`.

        Raises:
            ValueError: a layer is missing, or tokens that are not those of the decisions.
        """
        self._likes.add(decisions, tokens, domain)
        for name in self.layers:
            recorded = decisions[name]
            for decision in [recorded] if isinstance(recorded, Decision) else recorded:
                self._tallies[name].add(decision)
                self._routers[name].add(decision)
                if isinstance(decision.routing, SparseRouting):
                    self._chosen[name].append(chosen_matrix(decision))

    def add_weights(self, layer: str, parts: Iterable[Tensor]) -> None:
        """The weights of a layer's experts, `[experts, ...]` each; without any, nothing is said of them."""
        matrix = cosines(parts)
        if matrix is not None:
            self._similar[layer]["weights"] = matrix

    def add_outputs(self, layer: str, outputs: Tensor) -> None:
        """What each of a layer's experts answers to the same tokens, `[experts, tokens, width]`."""
        self._similar[layer]["outputs"] = output_cosines(outputs)

    def result(self, domains: Sequence[str], tokenizer: Any) -> dict[str, Any]:
        """What was found: `layers`, a dictionary of plain numbers each, and `findings`, sentences.

        Args:
            domains: names of the kinds of text, in the order of their numbers.
            tokenizer: anything with `decode_bytes(ids) -> bytes`.

        Raises:
            ValueError: no batch was added.
        """
        if not any(tally.tokens for tally in self._tallies.values()):
            raise ValueError("no token was routed; run the model on some text and add its decisions first")
        likes = self._likes.result(domains, tokenizer)
        by_name = {layer["name"]: layer for layer in likes["layers"]}
        chosen = {name: torch.cat(parts) for name, parts in self._chosen.items() if parts}
        layers = []
        for number, (name, label) in enumerate(zip(self.layers, layer_labels(self.layers), strict=True)):
            if self._tallies[name].tokens:
                following = self.layers[number + 1] if number + 1 < len(self.layers) else None
                layers.append(
                    {"name": name, "label": label}
                    | self._layer(name)
                    | _of_choices(chosen.get(name), following, chosen)
                    | {"specialisation": {key: value for key, value in by_name[name].items() if key != "name"}}
                )
        findings = [f"{layer['label']}: {sentence}" for layer in layers for sentence in layer["findings"]]
        return {
            "domains": list(domains),
            "classes": likes["classes"],
            "layers": layers,
            "findings": findings,
        }

    def _layer(self, name: str) -> dict[str, Any]:
        found = self._tallies[name].result() | self._routers[name].result()
        load, per_token = found["load"], found["experts_per_token"]
        found["num_experts"] = len(load)
        found["even_entropy"] = math.log(len(load))
        found["dead"] = dead_experts(load, per_token)
        found["never"] = [expert for expert, share in enumerate(load) if share == 0]
        found["coverage"] = [float(f"{value:.6g}") for value in coverage(load)]
        found["experts_for_90"] = experts_for(found["coverage"], 0.9)
        found["findings"] = _idle(found) + router_findings(found)
        for kind in ("weights", "outputs"):
            matrix = self._similar[name].get(kind)
            found[f"similarity_of_{kind}"] = None if matrix is None else similarity(matrix, load)
        return found


def _of_choices(chosen: Tensor | None, following: str | None, every: Mapping[str, Tensor]) -> dict[str, Any]:
    if chosen is None:  # every token meets every expert
        return {"coactivation": None, "next_layer": None}
    found: dict[str, Any] = {"coactivation": None, "next_layer": None}
    if bool((chosen.sum(1) > 1).any()):
        found["coactivation"] = _coactivation(chosen)
    if following is not None and following in every:
        predicted = next_layer(chosen, every[following])
        found["next_layer"] = None if predicted is None else {"layer": following} | predicted
    return found


def _coactivation(chosen: Tensor) -> dict[str, Any]:
    lift, counts = coactivation(chosen), together(chosen)
    experts = busiest(counts.diagonal().tolist(), MOST)
    seen = torch.where(counts >= 10, lift, 0.0)  # a pair that met by chance is no pair
    pairs = [[a, b, value, int(counts[a, b])] for a, b, value in top_pairs(seen, 10) if value > 1]
    return {"pairs": pairs, "experts": experts, "lift": rounded(lift[experts][:, experts])}


def _idle(layer: Mapping[str, Any]) -> list[str]:
    found, never, dead = [], layer["never"], [e for e in layer["dead"] if e not in layer["never"]]
    for experts, what in ((never, "never routed"), (dead, "dead")):
        if experts:
            shown = ", ".join(map(str, experts[:12])) + (" ..." if len(experts) > 12 else "")
            word = "expert" if len(experts) == 1 else f"{len(experts)} experts"
            found.append(f"{word} {what} on this text: {shown}")
    return found
