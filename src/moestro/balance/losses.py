"""Auxiliary losses: functions of a Decision, each in its named conventions.

Counts carry no gradient; probabilities do. Padding (`valid` False) enters nothing; a call without a valid token
gives 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moestro.balance.counts import count, counted_choices, facts, noted, valid_tokens
from moestro.routing import Decision
from moestro.routing.context import group_by_sequence

Convention = Literal["switch", "megatron", "transformers"]
_CONVENTIONS = ("switch", "megatron", "transformers")


def load_times_probability(decision: Decision, convention: Convention = "switch") -> Tensor:
    """The load-times-probability loss: low when no expert is both popular and likely.

        E * sum_e f_e P_e,   P_e = mean over tokens of p[t, e]

    One formula, three conventions for the counts f:
        `switch`: first choices only, f sums to 1, optimum 1 (Lepikhin et al. 2020; Fedus et al. 2021, eqs. 4-6);
        `megatron`: all choices divided by their number, f sums to 1, optimum 1;
        `transformers`: all k choices, f sums to k, optimum k: k times the `megatron` value.
    Counts are of choices before any drop. `transformers` itself pools all layers before multiplying; here the
    loss is per layer, as in the papers.

    Args:
        decision: of a token-choice router.
        convention: see above.

    Returns: a scalar.

    Raises:
        ValueError: an unknown convention, or a decision without probabilities or choices.
    """
    if convention not in _CONVENTIONS:
        raise ValueError(f"unknown convention {convention!r}; choose one of {', '.join(_CONVENTIONS)}")
    probs, choice, valid = facts(decision)
    counted = counted_choices(decision, choice)
    if convention == "switch":
        choice, counted = choice[:, :1], counted[:, :1]
    num_experts = probs.shape[1]
    total = valid.sum().clamp(min=1)
    counts = count(choice, counted, num_experts, probs.dtype)
    counts = counts / (counted.sum().clamp(min=1) if convention == "megatron" else total)
    mean = (probs * valid.unsqueeze(1)).sum(0) / total
    return num_experts * (counts * mean).sum()


@dataclass(frozen=True)
class LoadTimesProbability:
    """`load_times_probability` with its convention chosen: a loss for `MoE(losses=...)`."""

    convention: Convention = "switch"

    def __post_init__(self) -> None:
        if self.convention not in _CONVENTIONS:
            raise ValueError(f"unknown convention {self.convention!r}; choose one of {', '.join(_CONVENTIONS)}")

    def __call__(self, decision: Decision) -> Tensor:
        return load_times_probability(decision, self.convention)


@dataclass(frozen=True)
class SequenceBalance:
    """Load times probability inside each sequence, averaged over sequences.

        mean over sequences of sum_e f_e P_e,   f_e = E / (k L) * count_e,   P_e = mean_t s[t, e] / sum_j s[t, j]
        DeepSeek-AI 2024 (V3), eqs. 17-20; the counts are of the top k of the unbiased scores s

    Optimum 1. A sequence without valid tokens counts for nothing.
    """

    def __call__(self, decision: Decision) -> Tensor:
        """Raises ValueError for a decision without probabilities or choices."""
        probs, choice, valid = facts(decision)
        num_experts, k = probs.shape[1], choice.shape[1]
        token, present, _ = group_by_sequence(decision.notes.get("sequence"), valid, len(probs), probs.device)
        if not len(token):
            return probs.sum() * 0
        best = probs.sort(dim=-1, descending=True, stable=True).indices[:, :k]  # without the selection bias
        chosen = torch.zeros_like(probs).scatter_(1, best, 1.0)
        share = probs / probs.sum(-1, keepdim=True).clamp(min=torch.finfo(probs.dtype).tiny)
        mask = present.unsqueeze(-1).to(probs.dtype)
        length = mask.sum(1).clamp(min=1)  # [sequences, 1]
        counts = (chosen[token] * mask).sum(1) * num_experts / (k * length)
        mean = (share[token] * mask).sum(1) / length
        return (counts * mean).sum() / present.any(1).sum().clamp(min=1)


def z_loss(decision: Decision) -> Tensor:
    """Keeps logits small: `mean over tokens of logsumexp(logits)^2` (Zoph et al. 2022, eq. 5).

    Raises:
        ValueError: a decision without logits.
    """
    if decision.logits is None:
        raise ValueError("z-loss needs logits, but this router has none")
    valid = valid_tokens(decision, len(decision.logits))
    squares = decision.logits.logsumexp(-1).square()
    return (squares * valid).sum() / valid.sum().clamp(min=1)


def cv_squared(values: Tensor, epsilon: float = 1e-10) -> Tensor:
    """Squared coefficient of variation with the population variance: `Var(v) / (Mean(v)^2 + epsilon)`."""
    return values.var(correction=0) / (values.mean().square() + epsilon)


def importance_cv_squared(decision: Decision) -> Tensor:
    """CV^2 of the summed combine weights per expert (Shazeer et al. 2017, eqs. 6-7)."""
    routing = decision.routing
    importance = routing.combine_matrix().sum(0)
    return cv_squared(importance)


def load_cv_squared(decision: Decision) -> Tensor:
    """CV^2 of the smooth load of a noisy top-k router (Shazeer et al. 2017, eqs. 8-11, appendix A).

        Load_e = sum_t Phi((clean[t, e] - threshold[t, e]) / std[t, e])
        threshold[t, e] = k-th largest noisy logit of token t with expert e left out

    Gradients flow through logits, standard deviations and thresholds. Without noise (evaluation), or with
    k = E, the load is the hard count and carries no gradient.

    Raises:
        ValueError: a decision without choices.
    """
    choice = noted(decision, "choice")
    num_experts, k = decision.routing.num_experts, choice.shape[1]
    valid = valid_tokens(decision, len(choice))
    std, noisy, clean = decision.notes.get("noise_std"), decision.notes.get("noisy_logits"), decision.logits
    if std is None or noisy is None or clean is None or k == num_experts:
        dtype = torch.float32 if clean is None else clean.dtype
        return cv_squared(count(choice, counted_choices(decision, choice), num_experts, dtype))
    ranked = noisy.sort(dim=-1, descending=True, stable=True).values
    inside = torch.zeros_like(noisy, dtype=torch.bool).scatter_(1, choice, True)
    threshold = torch.where(inside, ranked[:, k : k + 1], ranked[:, k - 1 : k])
    chance = torch.special.ndtr((clean - threshold) / std)
    return cv_squared((chance * valid.unsqueeze(1)).sum(0))
