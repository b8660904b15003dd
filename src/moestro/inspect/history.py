"""What routing.jsonl says about each layer, sorted out by layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moestro.inspect.dead import dead_experts, dead_threshold
from moestro.inspect.runfolder import number


@dataclass
class LayerHistory:
    """One layer's routing over time; `loads` [records][experts] are shares that sum to 1.

    `final` is the load at the end: of the last record, or better, of the whole validation text.
    """

    name: str
    label: str = ""
    steps: list[int] = field(default_factory=list)
    loads: list[list[float]] = field(default_factory=list)
    curves: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)
    experts_per_token: float = 1.0
    final: list[float] = field(default_factory=list)

    @property
    def num_experts(self) -> int:
        return len(self.loads[-1])

    @property
    def dead(self) -> list[int]:
        """The experts that are dead at the end."""
        return dead_experts(self.final, self.experts_per_token)

    @property
    def threshold(self) -> float:
        """The share of the tokens below which an expert is dead."""
        return dead_threshold(self.num_experts, self.experts_per_token)

    def add(self, step: int, record: Mapping[str, Any]) -> None:
        """Adds one record; a load of another length than before starts the history anew."""
        load = _shares(record.get("load"))
        if load is None:
            return
        if self.loads and len(load) != self.num_experts:
            self.steps, self.loads = [], []
        self.steps.append(step)
        self.loads.append(load)
        self.final = load
        self.experts_per_token = number(record.get("experts_per_token")) or 1.0
        for name in ("entropy", "margin", "dropped"):
            value = number(record.get(name))
            if value is not None:
                steps, values = self.curves.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)


def histories(routing: Sequence[Mapping[str, Any]]) -> list[LayerHistory]:
    """The layers in the order in which the records name them; those without any load are left out."""
    found: dict[str, LayerHistory] = {}
    for record in routing:
        layers = record.get("layers")
        for layer in layers if isinstance(layers, list) else []:
            if isinstance(layer, dict):
                name = str(layer.get("name", "unnamed"))
                found.setdefault(name, LayerHistory(name)).add(record["step"], layer)
    known = [history for history in found.values() if history.loads]
    for history, label in zip(known, layer_labels([history.name for history in known]), strict=True):
        history.label = label
    return known


def use_validation_load(layers: Sequence[LayerHistory], shares: Mapping[str, list[float]]) -> bool:
    """Take every layer's final load from shares by layer name; leaves all as they are unless all are known."""
    known = [_shares(shares.get(layer.name)) for layer in layers]
    complete = [load for layer, load in zip(layers, known, strict=True) if load and len(load) == layer.num_experts]
    if not layers or len(complete) < len(layers):
        return False
    for layer, load in zip(layers, complete, strict=True):
        layer.final = load
    return True


def layer_labels(names: Sequence[str]) -> list[str]:
    """ "layers.3.moe" as "layer 3" where the first number of each name tells the layers apart."""
    numbers = [re.search(r"\d+", name) for name in names]
    labels = [f"layer {int(match[0])}" if match else name for match, name in zip(numbers, names, strict=True)]
    return labels if len(set(labels)) == len(labels) else list(names)


def _shares(load: Any) -> list[float] | None:
    values = [number(share) for share in load] if isinstance(load, list) else []
    known = [max(value, 0.0) for value in values if value is not None]
    total = sum(known)
    return [value / total for value in known] if known and len(known) == len(values) and total > 0 else None
