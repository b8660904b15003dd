"""Auxiliary losses: functions of a Decision, each in its named conventions.

Counts carry no gradient; probabilities do. Padding (`valid` False) enters nothing; a call without a valid token
gives 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from moestro.balance.counts import chosen_by, counted_choices, facts, logits_of, noted
from moestro.balance.loss import PerSequence, Sums, TokenLoss, TokenMean
from moestro.routing import Decision, top_k

Convention = Literal["switch", "megatron", "transformers"]
_CONVENTIONS = ("switch", "megatron", "transformers")
Variance = Literal["population", "unbiased"]


@dataclass(frozen=True)
class LoadTimesProbability(TokenLoss):
    """The load-times-probability loss: low when no expert is both popular and likely.

        E * sum_e f_e P_e,   P_e = mean over tokens of p[t, e]

    One formula, three conventions for the counts f:
        `switch`: first choices only, f sums to 1, optimum 1 (Lepikhin et al. 2020; Fedus et al. 2021, eqs. 4-6);
        `megatron`: all choices divided by their number, f sums to 1, optimum 1;
        `transformers`: all k choices, f sums to k, optimum k: k times the `megatron` value.
    Counts are of choices before any drop. `transformers` itself pools all layers before multiplying: that is
    `RoutingLog(model, layers="pooled")`; alone the loss is per layer, as in the papers.

    Attributes:
        convention: see above.

    Raises:
        ValueError: an unknown convention; when called, a decision without probabilities or choices.
    """

    convention: Convention = "switch"

    def __post_init__(self) -> None:
        if self.convention not in _CONVENTIONS:
            raise ValueError(f"unknown convention {self.convention!r}; choose one of {', '.join(_CONVENTIONS)}")

    def terms(self, decision: Decision) -> dict[str, Tensor]:
        probs, choice, counted = facts(decision)
        if self.convention == "switch":
            choice, counted = choice[:, :1], counted[:, :1]
        chosen = chosen_by(choice, counted, probs.shape[1], probs.dtype)
        return {"chosen": chosen, "choices": counted.sum(1), "probs": probs}

    def value(self, sums: Sums) -> Tensor:
        tokens = sums["tokens"].clamp(min=1)
        divisor = sums["choices"].clamp(min=1) if self.convention == "megatron" else tokens
        f, mean = sums["chosen"] / divisor.unsqueeze(-1), sums["probs"] / tokens.unsqueeze(-1)
        return f.shape[-1] * (f * mean).sum(-1)


def load_times_probability(decision: Decision, convention: Convention = "switch") -> Tensor:
    """`LoadTimesProbability(convention)` of a decision, a scalar."""
    return LoadTimesProbability(convention)(decision)


@dataclass(frozen=True)
class UnbiasedBalance(TokenLoss):
    """Load times probability of normalised scores, whose counts know no selection bias.

    sum_e f_e P_e,   f_e = E / (k T) * count_e of the k best scores,   P_e = mean_t s[t, e] / sum_j s[t, j]
    """

    def terms(self, decision: Decision) -> dict[str, Tensor]:
        """Raises ValueError for a decision without probabilities or choices."""
        probs, choice, _ = facts(decision)
        best = torch.zeros_like(probs).scatter_(1, top_k(probs, choice.shape[1]), 1 / max(choice.shape[1], 1))
        share = probs / probs.sum(-1, keepdim=True).clamp(min=torch.finfo(probs.dtype).tiny)
        return {"best": best, "share": share}

    def value(self, sums: Sums) -> Tensor:
        tokens = sums["tokens"].clamp(min=1).unsqueeze(-1)
        return sums["best"].shape[-1] * (sums["best"] / tokens * (sums["share"] / tokens)).sum(-1)


@dataclass(frozen=True)
class SequenceBalance(PerSequence):
    """Load times probability inside each sequence, averaged over sequences.

        mean over sequences of sum_e f_e P_e,   f_e = E / (k L) * count_e,   P_e = mean_t s[t, e] / sum_j s[t, j]
        DeepSeek-AI 2024 (V3), eqs. 17-20; the counts are of the top k of the unbiased scores s

    Optimum 1. A sequence without valid tokens counts for nothing.
    """

    loss: TokenLoss = field(default_factory=UnbiasedBalance)


class ZLoss(TokenMean):
    """Keeps logits small: `mean over tokens of logsumexp(logits)^2` (Zoph et al. 2022, eq. 5)."""

    def each(self, decision: Decision) -> Tensor:
        """Raises ValueError for a decision without logits."""
        return logits_of(decision).logsumexp(-1).square()


z_loss = ZLoss()


def cv_squared(values: Tensor, variance: Variance = "population", epsilon: float = 1e-10) -> Tensor:
    """Squared coefficient of variation over the last dimension: `Var(v) / (Mean(v)^2 + epsilon)`.

    Args:
        values: one per expert.
        variance: `population` divides by E (Shazeer et al. 2017), `unbiased` by E - 1 (as some releases do).
        epsilon: keeps nothing at all from dividing by 0.
    """
    correction = 1 if variance == "unbiased" and values.shape[-1] > 1 else 0
    return values.var(-1, correction=correction) / (values.mean(-1).square() + epsilon)


@dataclass(frozen=True)
class Variation(TokenLoss):
    """CV^2 of what the experts receive, summed over tokens; subclasses say what that is.

    Attributes:
        variance: `population` or `unbiased`, see `cv_squared`.

    Raises:
        ValueError: another variance.
    """

    variance: Variance = "population"

    def __post_init__(self) -> None:
        if self.variance not in ("population", "unbiased"):
            raise ValueError(f"unknown variance {self.variance!r}; choose population or unbiased")

    def value(self, sums: Sums) -> Tensor:
        return cv_squared(sums["received"], self.variance)


class Importance(Variation):
    """CV^2 of the summed combine weights per expert (Shazeer et al. 2017, eqs. 6-7)."""

    def terms(self, decision: Decision) -> dict[str, Tensor]:
        return {"received": decision.routing.combine_matrix()}


class SmoothLoad(Variation):
    """CV^2 of the smooth load of a noisy top-k router (Shazeer et al. 2017, eqs. 8-11, appendix A).

        Load_e = sum_t Phi((clean[t, e] - threshold[t, e]) / std[t, e])
        threshold[t, e] = k-th largest noisy logit of token t with expert e left out

    Gradients flow through logits, standard deviations and thresholds. Without noise (evaluation), or with
    k = E, the load is the hard count and carries no gradient.
    """

    def terms(self, decision: Decision) -> dict[str, Tensor]:
        """Raises ValueError for a decision without choices."""
        choice = noted(decision, "choice")
        num_experts, k = decision.routing.num_experts, choice.shape[1]
        std, noisy, clean = decision.notes.get("noise_std"), decision.notes.get("noisy_logits"), decision.logits
        if std is None or noisy is None or clean is None or k == num_experts:
            dtype = torch.float32 if clean is None else clean.dtype
            return {"received": chosen_by(choice, counted_choices(decision, choice), num_experts, dtype)}
        ranked = noisy.sort(dim=-1, descending=True, stable=True).values
        inside = torch.zeros_like(noisy, dtype=torch.bool).scatter_(1, choice, True)
        threshold = torch.where(inside, ranked[:, k : k + 1], ranked[:, k - 1 : k])
        return {"received": torch.special.ndtr((clean - threshold) / std)}


importance_cv_squared = Importance()
load_cv_squared = SmoothLoad()
