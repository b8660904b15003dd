"""What a run gained by moving its experts: the busiest process's load as it was, and with experts in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moestro.inspect.history import LayerHistory
from moestro.parallel import Placement


@dataclass(frozen=True)
class MovedExperts:
    """What the events of a run say.

    Attributes:
        decisions: steps after which experts moved.
        moved: experts that changed their process, over all layers.
        num_bytes: what that sent.
        steps: of the routing records.
        placed: at each, largest over mean load of a process, averaged over layers.
        in_order: the same, had no expert moved.
    """

    decisions: int
    moved: int
    num_bytes: int
    steps: list[int]
    placed: list[float]
    in_order: list[float]

    @property
    def gains(self) -> tuple[float, float]:
        """Largest over mean load, as it was and in order, averaged over the records after the first move."""
        return sum(self.placed) / len(self.placed), sum(self.in_order) / len(self.in_order)


def moved_experts(layers: Sequence[LayerHistory], events: Sequence[Mapping[str, Any]]) -> MovedExperts | None:
    """None where nothing moved, or no record was made after it did."""
    moves = [event for event in events if event.get("event") == "placement" and event.get("layers")]
    if not moves:
        return None
    parts = [part for event in moves for part in event["layers"]]
    first = min(event["step"] for event in moves)
    found: dict[int, list[tuple[float, float]]] = {}
    for layer in layers:
        tables = _placements(layer, moves)
        for step, load in zip(layer.steps, layer.loads, strict=True):
            if tables and step > first:
                now = [table for since, table in tables if since < step][-1]
                found.setdefault(step, []).append((_peak(now, load), _peak(tables[0][1], load)))
    if not found:
        return None
    means = {step: [sum(each) / len(each) for each in zip(*found[step], strict=True)] for step in sorted(found)}
    return MovedExperts(
        len(moves),
        sum(part["moved"] for part in parts),
        sum(part["bytes"] for part in parts),
        list(means),
        [placed for placed, _ in means.values()],
        [in_order for _, in_order in means.values()],
    )


def _placements(layer: LayerHistory, moves: Sequence[Mapping[str, Any]]) -> list[tuple[int, Placement]]:
    """After which step which placement of a layer held, beginning with that in order; empty if it never moved."""
    told = [(move["step"], part) for move in moves for part in move["layers"] if part["layer"] == layer.name]
    if not told:
        return []
    ranks, slots = told[0][1]["ranks"], len(told[0][1]["slots"])
    found = [(0, Placement.in_turn(layer.num_experts, ranks, slots))]
    return [*found, *((step, Placement(tuple(part["slots"]), layer.num_experts, ranks)) for step, part in told)]


def _peak(placement: Placement, load: Sequence[float]) -> float:
    return 1 / placement.balancedness(load)
