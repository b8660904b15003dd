"""What changed between two models, or two runs of one, in whom their routers choose."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moestro.inspect.dead import dead_experts
from moestro.inspect.history import layer_labels
from moestro.inspect.statistics import LayerTally, chosen_matrix, probabilities, valid_tokens
from moestro.routing import Decision, SparseRouting

PROBES = 2048
"""Tokens whose combine weights and probabilities are kept for comparing."""


class LayerRoutes:
    """What the router of one layer decided for the tokens of a text, in their order.

    Memory: one byte per token and expert, and 8 bytes per expert for each of the first `PROBES` tokens.

    Args:
        num_experts: experts that the router chooses among.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts, self.tokens = num_experts, 0
        self._load = torch.zeros(num_experts, dtype=torch.float64)
        self._chosen: list[Tensor] = []
        self._weight: list[Tensor] = []
        self._probs: list[Tensor] = []
        self._by_choice = True

    def add(self, decision: Decision) -> None:
        """Add one call of the router; padding does not count."""
        valid = valid_tokens(decision)
        tally = LayerTally()
        tally.add(decision)
        assert tally.load is not None
        self._load += tally.load
        left = max(PROBES - self.tokens, 0)
        self.tokens += int(valid.sum())
        if isinstance(decision.routing, SparseRouting):
            self._chosen.append(chosen_matrix(decision))
        else:  # every token meets every expert
            self._by_choice = False
        if left:
            self._weight.append(decision.routing.combine_matrix().detach().cpu().float()[valid][:left])
            probs = probabilities(decision, valid)
            self._probs += [] if probs is None else [probs[:left].float()]

    def add_choices(self, index: Tensor, weight: Tensor, keep: Tensor | None = None) -> None:
        """Add the choices of a trace.

        Args:
            index: chosen experts, `[tokens, k]`.
            weight: their combine weights, `[tokens, k]`.
            keep: choices that were carried out, `[tokens, k]`; None = all.
        """
        index, shape = index.long(), (len(index), self.num_experts)
        self._load += torch.bincount(index.flatten(), minlength=self.num_experts).double()
        self._chosen.append(torch.zeros(shape, dtype=torch.bool).scatter_(1, index, True))
        left = max(PROBES - self.tokens, 0)
        self.tokens += len(index)
        carried = weight[:left].float() if keep is None else weight[:left].float() * keep[:left]
        self._weight.append(torch.zeros(len(carried), self.num_experts).scatter_add_(1, index[:left], carried))

    @property
    def chosen(self) -> Tensor | None:
        """Which experts each token chose, `[tokens, experts]` bool; None where it meets all of them."""
        return torch.cat(self._chosen) if self._by_choice and self._chosen else None

    @property
    def weight(self) -> Tensor:
        """Combine weights of the first tokens, `[probes, experts]`."""
        return torch.cat(self._weight)

    @property
    def probs(self) -> Tensor | None:
        """Probabilities of the first tokens, `[probes, experts]`; None where the router has none."""
        return torch.cat(self._probs) if self._probs else None

    @property
    def load(self) -> list[float]:
        """Each expert's share of the choices."""
        return (self._load / self._load.sum().clamp_min(1e-300)).tolist()

    @property
    def dead(self) -> list[int]:
        """Experts that count as dead, see `moestro.inspect.dead`."""
        return dead_experts(self.load, float(self._load.sum()) / max(self.tokens, 1))


def add_decisions(
    routes: dict[str, LayerRoutes], decisions: Mapping[str, Decision | Iterable[Decision]]
) -> dict[str, LayerRoutes]:
    """Add what a log recorded, by layer; answers with `routes`."""
    for name, recorded in decisions.items():
        for decision in [recorded] if isinstance(recorded, Decision) else recorded:
            if name not in routes:
                routes[name] = LayerRoutes(decision.routing.num_experts)
            routes[name].add(decision)
    return routes


def routing_difference(one: LayerRoutes, other: LayerRoutes) -> dict[str, Any]:
    """How the routing of one layer differs between A and B that saw the same tokens.

    Returns: plain numbers, None where they are not defined:
        `agreement`, mean over tokens of `|A n B| / max(|A|, |B|)` of the sets of chosen experts;
        `blind`, the agreement of blind choices with the same loads, `sum_e a_e b_e / max(k_A, k_B)` where `a_e` is
        the share of tokens that choose e;
        `same_set`, the share of tokens whose sets are equal;
        `shared_weight`, mean over tokens of `sum_e min(w_A, w_B)`, weights divided by their sum;
        `divergence`, Jensen-Shannon divergence of the probabilities in nats, 0 to ln 2, mean over tokens;
        `load_a`, `load_b` `[experts]`; `load_shift`, half the sum of `|a - b|`; `dead_a`, `dead_b`; `died`, dead in
        B alone; `revived`, dead in A alone.

    Raises:
        ValueError: other tokens or experts.
    """
    if (one.tokens, one.num_experts) != (other.tokens, other.num_experts):
        raise ValueError(
            f"A has {one.tokens} tokens and {one.num_experts} experts, B {other.tokens} and {other.num_experts}; "
            "only choices among the same experts for the same tokens can be compared"
        )
    loads, dead = (one.load, other.load), (one.dead, other.dead)
    return {
        **_agreement(one.chosen, other.chosen),
        "shared_weight": _shared(one.weight, other.weight),
        "divergence": _divergence(one.probs, other.probs),
        "load_a": _brief(loads[0]),
        "load_b": _brief(loads[1]),
        "load_shift": sum(abs(a - b) for a, b in zip(*loads, strict=True)) / 2,
        "dead_a": dead[0],
        "dead_b": dead[1],
        "died": [expert for expert in dead[1] if expert not in dead[0]],
        "revived": [expert for expert in dead[0] if expert not in dead[1]],
    }


ROUTING = (
    "agreement",
    "blind",
    "same_set",
    "shared_weight",
    "divergence",
    "load_a",
    "load_b",
    "load_shift",
    "dead_a",
    "dead_b",
    "died",
    "revived",
)


def difference(
    names: Sequence[str],
    routing: Mapping[str, Mapping[str, Any]],
    weights: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Layers in order with everything known about each, and sentences about what stands out.

    Args:
        names: of the layers.
        routing: of `routing_difference`, by layer; empty where nothing ran.
        weights: `experts` and `router` by layer, see `moestro.hf.differences`; empty for traces.

    Returns: `layers`, a dictionary of plain numbers each, and `findings`.
    """
    layers = []
    for name, label in zip(names, layer_labels(names), strict=True):
        found: dict[str, Any] = {"name": name, "label": label}
        found |= {key: routing.get(name, {}).get(key) for key in ROUTING}
        found |= {key: weights.get(name, {}).get(key) for key in ("experts", "router")}
        layers.append(found | {"findings": _findings(found)})
    sentences = [f"{layer['label']}: {sentence}" for layer in layers for sentence in layer["findings"]]
    return {"layers": layers, "findings": sentences}


def _findings(layer: Mapping[str, Any]) -> list[str]:
    found = []
    for key, verb in (("died", "died: dead in B, not in A"), ("revived", "came to life: dead in A, not in B")):
        experts = layer[key]
        if experts:
            shown = ", ".join(map(str, experts[:12])) + (" ..." if len(experts) > 12 else "")
            found.append(f"expert {shown} {verb}" if len(experts) == 1 else f"experts {shown} {verb}")
    agreement, blind = layer["agreement"], layer["blind"]
    if agreement is not None and agreement < 0.999 and agreement <= blind + 0.1 * (1 - blind):
        found.append(f"the choices agree in {100 * agreement:.0f} %, blind ones would in {100 * blind:.0f} %")
    return found + _stuck(layer["experts"])


def _stuck(experts: Mapping[str, Any] | None) -> list[str]:
    """Experts that stayed bit for bit as they were while others moved."""
    if experts is None:
        return []
    still = [expert for expert, distance in enumerate(experts["distance"]) if distance == 0]
    if not still or len(still) == len(experts["distance"]):
        return []
    shown = ", ".join(map(str, still[:12])) + (" ..." if len(still) > 12 else "")
    return [f"{len(still)} of {len(experts['distance'])} experts have the same weights in both: {shown}"]


def _agreement(one: Tensor | None, other: Tensor | None) -> dict[str, float | None]:
    if one is None or other is None or not len(one):
        return {"agreement": None, "blind": None, "same_set": None}
    counts = torch.maximum(one.sum(1), other.sum(1)).clamp_min(1)
    common = (one & other).sum(1)
    blind = (one.double().mean(0) * other.double().mean(0)).sum() / counts.double().mean()
    return {
        "agreement": float((common.double() / counts).mean()),
        "blind": float(blind),
        "same_set": float((one == other).all(1).double().mean()),
    }


def _shared(one: Tensor, other: Tensor) -> float | None:
    one, other = (each.double() / each.double().sum(1, keepdim=True).clamp_min(1e-300) for each in (one, other))
    routed = (one.sum(1) > 0) & (other.sum(1) > 0)  # a token whose choices were all dropped has no weight
    return float(torch.minimum(one, other).sum(1)[routed].mean()) if bool(routed.any()) else None


def _divergence(one: Tensor | None, other: Tensor | None) -> float | None:
    if one is None or other is None or not len(one):
        return None
    one, other = one.double(), other.double()
    entropy = torch.special.entr
    mixed = entropy((one + other) / 2) - (entropy(one) + entropy(other)) / 2
    return max(float(mixed.sum(1).mean()), 0.0)


def _brief(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.6g}") for value in values]
