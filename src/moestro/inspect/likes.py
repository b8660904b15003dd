"""What specialisation.json says about each layer, checked and ready for the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moestro.inspect.history import layer_labels
from moestro.inspect.runfolder import number


@dataclass(frozen=True)
class ExpertLikes:
    """One expert: its share of the layer's choices, and what it sees more often than a blind choice would."""

    share: float
    classes: list[tuple[str, float]]
    tokens: list[tuple[str, float]]


@dataclass(frozen=True)
class LayerLikes:
    """One layer: the share of each domain that each expert gets `[domains][experts]`, and the experts.

    `told_apart`: how often one choice gives the domain away, all domains being equally likely.
    """

    name: str
    label: str
    by_domain: list[list[float]]
    information: float | None
    highest: float | None
    told_apart: float | None
    experts: list[ExpertLikes]

    @property
    def separates(self) -> bool:
        """Whether the experts give domains away: a twentieth of the way from blind guesses to certainty."""
        if self.told_apart is None or len(self.by_domain) < 2:
            return False
        blind = 1 / len(self.by_domain)
        return self.told_apart - blind >= 0.05 * (1 - blind)


def layer_likes(content: Mapping[str, Any]) -> tuple[list[str], list[LayerLikes]]:
    """The domains and the layers; a damaged layer is left out."""
    domains = [str(domain) for domain in _list(content.get("domains"))]
    layers = [layer for layer in _list(content.get("layers")) if isinstance(layer, dict)]
    labels = layer_labels([str(layer.get("name", "unnamed")) for layer in layers])
    likes = [_layer(layer, label, len(domains)) for layer, label in zip(layers, labels, strict=True)]
    return domains, [layer for layer in likes if layer.by_domain or layer.experts]


def _layer(layer: Mapping[str, Any], label: str, num_domains: int) -> LayerLikes:
    table = [[number(cell) for cell in _list(row)] for row in _list(layer.get("load_by_domain"))]
    known = [[cell for cell in row if cell is not None] for row in table]
    whole = len(table) == num_domains > 0 and len({len(row) for row in table} | {len(row) for row in known}) == 1
    return LayerLikes(
        name=str(layer.get("name", "unnamed")),
        label=label,
        by_domain=known if whole and known[0] else [],
        information=number(layer.get("normalised_mutual_information")),
        highest=number(layer.get("highest_possible")),
        told_apart=number(layer.get("told_apart")),
        experts=[_expert(expert) for expert in _list(layer.get("experts")) if isinstance(expert, dict)],
    )


def _expert(expert: Mapping[str, Any]) -> ExpertLikes:
    share = number(expert.get("share")) or 0.0
    return ExpertLikes(share, _pairs(expert.get("top_classes")), _pairs(expert.get("top_tokens")))


def _pairs(value: Any) -> list[tuple[str, float]]:
    pairs = [pair for pair in _list(value) if isinstance(pair, list) and len(pair) == 2]
    return [(str(name), lift) for name, lift in ((name, number(lift)) for name, lift in pairs) if lift is not None]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
