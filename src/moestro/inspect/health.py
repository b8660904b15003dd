"""Whether a router is healthy: how large its logits are, how often it ties, and whether it says anything."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from moestro.inspect.statistics import probabilities, valid_tokens
from moestro.routing import Decision, SparseRouting

LARGE = 64.0
"""Logits from here on are rounded by up to 0.25 in bfloat16, which turns a probability by a quarter."""
SILENT = 0.01
"""Nats that a token must tell about its expert, on average; below, the router hardly looks at it."""


class RouterTally:
    """Sums over the decisions of one layer's router, on the CPU, padding left out."""

    def __init__(self) -> None:
        self.tokens = 0
        self.mass: Tensor | None = None  # [experts], of probabilities
        self.weight: Tensor | None = None  # [experts], of combine weights
        self.entropy = self.square = self.log_sum = self.largest = 0.0
        self.scored = self.ties = self.choosing = 0
        self.margins: list[Tensor] = []
        self.extremes = (math.inf, -math.inf)  # of the combine weights
        self.pairs = 0

    def add(self, decision: Decision) -> None:
        """Add one batch's decision."""
        valid = valid_tokens(decision)
        self.tokens += int(valid.sum())
        self._addprobabilities(probabilities(decision, valid))
        self._add_logits(decision, valid)
        self._add_choice(decision, valid)
        self._add_weights(decision)

    def _addprobabilities(self, probs: Tensor | None) -> None:
        if probs is not None:
            self.mass = probs.sum(0) if self.mass is None else self.mass + probs.sum(0)
            self.entropy += float(torch.special.entr(probs).sum())

    def _add_logits(self, decision: Decision, valid: Tensor) -> None:
        if decision.logits is None or len(decision.logits) != len(valid):
            return
        logits = decision.logits.detach().cpu().double()[valid]
        logits = logits.masked_fill(~logits.isfinite(), 0.0)
        self.scored += logits.numel()
        self.square += float(logits.square().sum())
        self.log_sum += float(logits.logsumexp(-1).square().sum())
        self.largest = max(self.largest, float(logits.abs().max()) if logits.numel() else 0.0)

    def _add_choice(self, decision: Decision, valid: Tensor) -> None:
        gap = selection_gap(decision)
        if gap is not None:
            self.choosing += int(valid.sum())
            self.ties += int((gap[valid] == 0).sum())
            self.margins.append(gap[valid])

    def _add_weights(self, decision: Decision) -> None:
        routing = decision.routing
        if not isinstance(routing, SparseRouting):
            total = routing.combine_matrix().detach().cpu().double().sum(0)
        else:
            weight = routing.weight.detach().cpu().double()
            expert = torch.arange(routing.num_experts).repeat_interleave(routing.offsets.detach().cpu().diff())
            total = torch.bincount(expert, weight, minlength=routing.num_experts)
            self.pairs += len(weight)
            if len(weight):
                low, high = self.extremes
                self.extremes = min(low, float(weight.min())), max(high, float(weight.max()))
        self.weight = total if self.weight is None else self.weight + total

    def result(self) -> dict[str, Any]:
        """Plain numbers, `None` where the router does not define one.

        `gate_mass` [experts]: mean probability; `weight_share` [experts]: share of the combine weight;
        `gap`: mean and quantiles over tokens of how far the last chosen expert lies ahead of the first that was
        not, in what the router sorts by; `tie_rate`: share of tokens where that is 0;
        `information`: nats that a token tells about its expert, `H(mean p) - mean H(p)`;
        `logit_rms`, `logit_max` (absolute), `log_sum_square` (the z-loss without its coefficient);
        `constant_weight`: every choice has the same combine weight.
        """
        mass = None if self.mass is None else self.mass / max(self.tokens, 1)
        rows = self.scored / len(self.weight) if self.weight is not None and len(self.weight) else 0
        low, high = self.extremes
        return {
            "gate_mass": None if mass is None else [float(f"{value:.6g}") for value in mass.tolist()],
            "weight_share": _shares(self.weight),
            "gap": self._gap(),
            "tie_rate": self.ties / self.choosing if self.choosing else None,
            "information": None
            if mass is None
            else max(float(torch.special.entr(mass).sum()) - self.entropy / max(self.tokens, 1), 0.0),
            "logit_rms": math.sqrt(self.square / self.scored) if self.scored else None,
            "logit_max": self.largest if self.scored else None,
            "log_sum_square": self.log_sum / rows if rows else None,
            "constant_weight": high - low < 1e-6 if self.pairs else None,
        }

    def _gap(self) -> dict[str, float] | None:
        gaps = torch.cat(self.margins) if self.margins else torch.zeros(0)
        if not len(gaps):
            return None
        low, middle, high = gaps.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=gaps.dtype)).tolist()
        return {"mean": float(gaps.mean()), "p10": low, "p50": middle, "p90": high}


def selection_gap(decision: Decision) -> Tensor | None:
    """How far each token's last chosen expert lies ahead of the best that was not, `[tokens]` float64.

    Measured in what the router sorts by, probability plus selection bias; below 0 where another rule (groups, a
    limit on devices) passed over a better one. None where tokens do not choose, or choose all.
    """
    choice, probs = decision.notes.get("choice"), decision.probs
    if choice is None or probs is None or probs.dim() != 2 or len(probs) != len(choice):
        return None
    if not 0 < choice.shape[1] < probs.shape[1]:
        return None
    score, choice = probs.detach().cpu().double(), choice.detach().cpu()
    if "bias" in decision.notes:
        score = score + decision.notes["bias"].detach().cpu().double()
    last = score.gather(1, choice).amin(1)
    return last - score.scatter(1, choice, -math.inf).amax(1)


def router_findings(layer: dict[str, Any]) -> list[str]:
    """What is wrong with a router, one sentence each; `layer` has the numbers of `RouterTally.result`."""
    found = []
    if layer["constant_weight"] and layer["experts_per_token"] <= 1:
        found.append("dead router: its one weight per token is always the same, so training cannot reach it")
    if layer["information"] is not None and layer["information"] < SILENT:
        found.append(f"silent router: a token tells {layer['information']:.2g} nats about its expert")
    if layer["logit_max"] is not None and layer["logit_max"] >= LARGE:
        found.append(f"large logits: up to {layer['logit_max']:.3g}, which bfloat16 rounds by up to 0.25 and more")
    if layer["tie_rate"]:
        found.append(f"ties: {100 * layer['tie_rate']:.3g} % of the tokens choose between equal experts")
    return found


def _shares(total: Tensor | None) -> list[float] | None:
    if total is None or not float(total.abs().sum()):
        return None
    return [float(f"{value:.6g}") for value in (total / total.sum()).tolist()]
