"""Importance and smooth load of routers that draw noise of a fixed size, or on two levels."""

from __future__ import annotations

import torch
from torch import Tensor

from moestro.balance.counts import chosen_by, counted_choices, logits_of, noted
from moestro.balance.loss import Sums
from moestro.balance.losses import Variation, cv_squared
from moestro.routing import Decision


class SoftmaxImportance(Variation):
    """CV^2 of the summed noise-free softmax per expert (Riquelme et al. 2021, appendix A)."""

    def terms(self, decision: Decision) -> dict[str, Tensor]:
        """Raises ValueError for a decision without logits."""
        return {"received": logits_of(decision).softmax(-1)}


class ThresholdLoad(Variation):
    """CV^2 of the chance that an expert's noise, drawn again, lifts it above the k-th noisy logit.

        Load_e = mean_t 1 - Phi((threshold[t] - clean[t, e]) / std[t, e]),   threshold[t] = k-th largest noisy logit
        Riquelme et al. 2021, appendix A; unlike Shazeer et al. 2017 the expert itself is not left out

    Without noise (evaluation) the load is the hard count, without a gradient.
    """

    def terms(self, decision: Decision) -> dict[str, Tensor]:
        """Raises ValueError for a decision without choices or logits."""
        choice, clean = noted(decision, "choice"), logits_of(decision)
        std, noisy = decision.notes.get("noise_std"), decision.notes.get("noisy_logits")
        if std is None or noisy is None:
            return {"received": chosen_by(choice, counted_choices(decision, choice), clean.shape[1], clean.dtype)}
        threshold = noisy.sort(dim=-1, descending=True, stable=True).values[:, choice.shape[1] - 1, None]
        return {"received": 1 - torch.special.ndtr((threshold - clean) / std)}

    def value(self, sums: Sums) -> Tensor:
        return cv_squared(sums["received"] / sums["tokens"].clamp(min=1).unsqueeze(-1), self.variance)


class TwoLevelLoad(Variation):
    """CV^2 of the smooth load of a router that first chooses groups.

    Load_(i,j) = Load(group i) * Load(expert j among the tokens sent to i) / tokens sent to i
    Shazeer et al. 2017, appendix B
    """

    def terms(self, decision: Decision) -> dict[str, Tensor]:
        """Raises ValueError for a decision of another kind of router."""
        names = ("group_chance", "place_chance", "sent")
        return {name: noted(decision, name) for name in names}

    def value(self, sums: Sums) -> Tensor:
        per_sent = sums["group_chance"] / (sums["sent"] + 1e-10)
        return cv_squared((sums["place_chance"] * per_sent.unsqueeze(-1)).flatten(-2), self.variance)


softmax_importance_cv_squared = SoftmaxImportance()
threshold_load_cv_squared = ThresholdLoad()
noted_load_cv_squared = TwoLevelLoad()
