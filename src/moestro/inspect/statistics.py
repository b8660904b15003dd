"""What one layer's router did, as a few numbers: load, entropy, margin, drops and dead experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from moestro.inspect.dead import dead_experts
from moestro.routing import Decision, SparseRouting


def layer_statistics(decisions: Decision | Iterable[Decision]) -> dict[str, Any]:
    """Describes the routing of one layer over one decision or many; padding tokens do not count.

    Many decisions are summed before anything is divided, so the answer is that of one long batch.

    Returns:
        a dictionary of plain numbers, ready for JSON (`None` where the router does not define the number):
        `load` [experts], shares that sum to 1: of the choices before capacity (token choice), of the taken
        tokens (expert choice), of the combine weight (soft and merging routing);
        `entropy`, mean over tokens of the entropy of the router's probabilities, in nats, scores such as
        sigmoids being divided by their sum first; `margin`, mean gap between the k-th and the k+1-th
        probability of a token (token choice only); `dropped`, share of the choices that capacity or another
        policy dropped, or, where experts choose, share of the tokens that no expert took;
        `dead`, number of experts below `dead_threshold` of the tokens; `experts_per_token`; `tokens`.
    """
    decisions = [decisions] if isinstance(decisions, Decision) else list(decisions)
    if not decisions:
        raise ValueError("no decision to describe; record at least one batch with RoutingLog.recording()")
    return tally_of(decisions).result()


def routing_record(step: int, decisions: Mapping[str, Decision | Iterable[Decision]]) -> dict[str, Any]:
    """One line of routing.jsonl: the statistics of every layer at a training step.

    Args:
        step: optimiser steps done.
        decisions: what `RoutingLog.decisions` holds, by layer name in model order.
    """
    tallies = {name: tally_of(of_layer) for name, of_layer in decisions.items()}
    return record_of(step, tallies)


def record_of(step: int, tallies: Mapping[str, LayerTally]) -> dict[str, Any]:
    """`routing_record` of decisions that were tallied before, perhaps by several processes."""
    return {"step": step, "layers": [{"name": name, **tally.result()} for name, tally in tallies.items()]}


def tally_of(decisions: Decision | Iterable[Decision]) -> LayerTally:
    """The sums over decisions of one layer."""
    tally = LayerTally()
    for decision in [decisions] if isinstance(decisions, Decision) else decisions:
        tally.add(decision)
    return tally


MEANS = ("entropy", "margin", "dropped")


class LayerTally:
    """Sums over the decisions of one layer, from which `layer_statistics` is divided at the end."""

    def __init__(self) -> None:
        self.load: Tensor | None = None  # [experts] float64, on the CPU
        self.tokens = 0
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def add(self, decision: Decision) -> None:
        """Adds one batch's decision."""
        valid = valid_tokens(decision)
        _, expert, amount = chosen_pairs(decision)
        load = torch.bincount(expert, amount, minlength=decision.routing.num_experts).double()
        self.load = load if self.load is None else self.load + load
        self.tokens += int(valid.sum())
        self._add("entropy", _entropy(decision, valid))
        self._add("margin", _margin(decision, valid))
        self._add("dropped", _dropped(decision, valid))

    def packed(self) -> Tensor:
        """The sums as float64 numbers, which add up over processes that tallied the same layer."""
        assert self.load is not None, "add a decision first"
        means = [[self.sums.get(name, 0.0), float(self.counts.get(name, 0))] for name in MEANS]
        return torch.cat([torch.tensor([float(self.tokens), *chain(*means)], dtype=torch.float64), self.load])

    @classmethod
    def unpacked(cls, numbers: Tensor) -> LayerTally:
        """The tally whose `packed` this is, `[1 + 2 * means + experts]`."""
        tally, numbers = cls(), numbers.cpu()
        tokens, *means = numbers[: 1 + 2 * len(MEANS)].tolist()
        tally.tokens, tally.load = int(tokens), numbers[1 + 2 * len(MEANS) :]
        tally.sums = dict(zip(MEANS, means[::2], strict=True))
        tally.counts = {name: int(count) for name, count in zip(MEANS, means[1::2], strict=True)}
        return tally

    def _add(self, name: str, values: Tensor | None) -> None:
        if values is not None:
            self.sums[name] = self.sums.get(name, 0.0) + float(values.double().sum())
            self.counts[name] = self.counts.get(name, 0) + values.numel()

    def _mean(self, name: str) -> float | None:
        return _brief(self.sums[name] / self.counts[name]) if self.counts.get(name) else None

    def result(self) -> dict[str, Any]:
        """The statistics of everything added so far; see `layer_statistics`."""
        assert self.load is not None, "add a decision first"
        total = float(self.load.sum())
        shares = (self.load / max(total, 1e-300)).tolist()
        per_token = total / max(self.tokens, 1)
        return {
            "load": [_brief(share) for share in shares],
            "entropy": self._mean("entropy"),
            "margin": self._mean("margin"),
            "dropped": self._mean("dropped"),
            "dead": len(dead_experts(shares, per_token)),
            "experts_per_token": _brief(per_token),
            "tokens": self.tokens,
        }


def valid_tokens(decision: Decision) -> Tensor:
    """Which tokens are text rather than padding, `[tokens]` bool on the CPU."""
    valid = decision.notes.get("valid")
    if valid is None:
        return torch.ones(decision.routing.num_tokens, dtype=torch.bool)
    return valid.detach().cpu().bool()


def chosen_pairs(decision: Decision) -> tuple[Tensor, Tensor, Tensor]:
    """Which expert every valid token went to: `token`, `expert` and `amount`, each `[pairs]`, on the CPU.

    Token choice: what the router chose, before capacity, one each. Expert choice: what was taken, one each.
    Soft and merging routing: every token meets every expert, in the amount of its combine weight.
    """
    choice = decision.notes.get("choice")
    routing = decision.routing
    if choice is not None:
        token = torch.arange(len(choice)).repeat_interleave(choice.shape[1])
        expert, amount = choice.detach().cpu().flatten(), None
    elif isinstance(routing, SparseRouting):
        expert = torch.arange(routing.num_experts).repeat_interleave(routing.offsets.detach().cpu().diff())
        token, amount = routing.token.detach().cpu(), None
    else:
        matrix = routing.combine_matrix().detach().cpu().double()  # [tokens, experts]
        token, expert = matrix.nonzero(as_tuple=True)
        amount = matrix[token, expert]
    if amount is None:
        amount = torch.ones(len(token), dtype=torch.float64)
    counted = valid_tokens(decision)[token]
    if choice is not None and "wanted" in decision.notes:
        counted = counted & decision.notes["wanted"].detach().cpu().flatten()
    return token[counted], expert[counted].long(), amount[counted]


def chosen_matrix(decision: Decision) -> Tensor:
    """Which experts each valid token chose, `[valid tokens, experts]` bool."""
    valid = valid_tokens(decision)
    chosen = torch.zeros(len(valid), decision.routing.num_experts, dtype=torch.bool)
    token, expert, _ = chosen_pairs(decision)
    chosen[token, expert] = True
    return chosen[valid]


def probabilities(decision: Decision, valid: Tensor) -> Tensor | None:
    """The router's scores as probabilities, `[valid tokens, experts]`, rows summing to 1."""
    probs = decision.probs
    if probs is None or probs.dim() != 2 or len(probs) != len(valid):
        return None
    probs = probs.detach().cpu().double()[valid]
    return probs / probs.sum(-1, keepdim=True).clamp_min(1e-300)


def _entropy(decision: Decision, valid: Tensor) -> Tensor | None:
    probs = probabilities(decision, valid)
    return None if probs is None else torch.special.entr(probs).sum(-1)


def _margin(decision: Decision, valid: Tensor) -> Tensor | None:
    choice, probs = decision.notes.get("choice"), probabilities(decision, valid)
    if choice is None or probs is None or not 0 < choice.shape[1] < probs.shape[1]:
        return None
    k = choice.shape[1]
    best = probs.topk(k + 1, dim=-1).values
    return best[:, k - 1] - best[:, k]


def _dropped(decision: Decision, valid: Tensor) -> Tensor | None:
    """One value per choice (or per token, where experts choose): 1 where it was dropped."""
    kept, choice = decision.notes.get("kept"), decision.notes.get("choice")
    if choice is not None:
        wanted = decision.notes.get("wanted", torch.ones_like(choice, dtype=torch.bool)).detach().cpu()[valid]
        kept = wanted if kept is None else kept.detach().cpu()[valid]
        return (~kept[wanted]).double()
    reached = torch.zeros(len(valid), dtype=torch.bool)
    reached[chosen_pairs(decision)[0]] = True
    return (~reached[valid]).double()


def _brief(value: float) -> float:
    """Six significant digits: enough for any picture, and a third of the bytes."""
    return float(f"{value:.6g}")
