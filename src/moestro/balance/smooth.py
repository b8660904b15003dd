"""Importance and smooth load of routers that draw noise of a fixed size."""

from __future__ import annotations

import torch
from torch import Tensor

from moestro.balance.counts import count, counted_choices, noted, valid_tokens
from moestro.balance.losses import cv_squared
from moestro.routing import Decision


def softmax_importance_cv_squared(decision: Decision) -> Tensor:
    """CV^2 of the summed noise-free softmax per expert, population variance (Riquelme et al. 2021, appendix A).

    Raises:
        ValueError: a decision without logits.
    """
    if decision.logits is None:
        raise ValueError("the importance loss needs logits, but this router has none")
    valid = valid_tokens(decision, len(decision.logits))
    return cv_squared((decision.logits.softmax(-1) * valid.unsqueeze(1)).sum(0))


def threshold_load_cv_squared(decision: Decision) -> Tensor:
    """CV^2 of the chance that an expert's noise, drawn again, lifts it above the k-th noisy logit.

        Load_e = mean_t 1 - Phi((threshold[t] - clean[t, e]) / std[t, e]),   threshold[t] = k-th largest noisy logit
        Riquelme et al. 2021, appendix A; unlike Shazeer et al. 2017 the expert itself is not left out

    Without noise (evaluation) the load is the hard count, without a gradient.

    Raises:
        ValueError: a decision without choices or logits.
    """
    choice, clean = noted(decision, "choice"), decision.logits
    if clean is None:
        raise ValueError("the load loss needs logits, but this router has none")
    std, noisy = decision.notes.get("noise_std"), decision.notes.get("noisy_logits")
    if std is None or noisy is None:
        return cv_squared(count(choice, counted_choices(decision, choice), clean.shape[1], clean.dtype))
    threshold = noisy.sort(dim=-1, descending=True, stable=True).values[:, choice.shape[1] - 1, None]
    chance = 1 - torch.special.ndtr((threshold - clean) / std)
    valid = valid_tokens(decision, len(clean))
    return cv_squared((chance * valid.unsqueeze(1)).sum(0) / valid.sum().clamp(min=1))
