"""Which layout a model is saved in: a stock one if it computes exactly this model, else our own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moestro.models.decoder import DecoderLM
from moestro.models.layouts.deepseek_v3 import DEEPSEEK_V3
from moestro.models.layouts.dense import LLAMA, QWEN3
from moestro.models.layouts.layout import Layout
from moestro.models.layouts.mixtral import MIXTRAL
from moestro.models.layouts.olmoe import OLMOE
from moestro.models.layouts.own import OWN
from moestro.models.layouts.qwen3_moe import QWEN3_MOE


@dataclass(frozen=True)
class Candidate:
    """A layout that may fit a method, and what config.json must say besides for the routing to be the method's."""

    layout: Layout
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """The layout chosen and, in words, why."""

    layout: Layout
    extra: dict[str, Any]
    reason: str


RENORMALISED = {"norm_topk_prob": True}
RAW = {"norm_topk_prob": False}

# in order of preference; None is the dense model
CANDIDATES: dict[str | None, tuple[Candidate, ...]] = {
    None: (Candidate(LLAMA), Candidate(QWEN3), Candidate(DEEPSEEK_V3)),
    "mixtral": (Candidate(MIXTRAL), Candidate(QWEN3_MOE, RENORMALISED), Candidate(OLMOE, RENORMALISED)),
    "qwen3": (Candidate(QWEN3_MOE, RENORMALISED), Candidate(MIXTRAL), Candidate(OLMOE, RENORMALISED)),
    "olmoe": (Candidate(OLMOE, RAW), Candidate(QWEN3_MOE, RAW)),
    "deepseek-v3": (Candidate(DEEPSEEK_V3),),
}

LAYOUTS = {layout.model_type: layout for layout in (MIXTRAL, QWEN3_MOE, OLMOE, DEEPSEEK_V3, LLAMA, QWEN3, OWN)}


def choose_layout(model: DecoderLM) -> Choice:
    """The first stock layout that computes exactly `model`, else our own, with the reason."""
    method = model.config["method"]
    reasons = []
    for candidate in CANDIDATES.get(method, ()):
        misfit = candidate.layout.misfit(model) or _unmapped(candidate.layout, model)
        if misfit is None:
            return Choice(candidate.layout, candidate.extra, f"{candidate.layout.name} computes exactly this model")
        reasons.append(f"{candidate.layout.name} does not fit: {misfit}")
    why = "; ".join(reasons) or f"no stock architecture routes like {method}"
    return Choice(OWN, {}, why)


def _unmapped(layout: Layout, model: DecoderLM) -> str | None:
    """A tensor that the layout has no place for."""
    tied = {"head.weight"} if model.config["tied_embeddings"] else set()
    left = set(model.state_dict()) - {rule.ours for rule in layout.rules(model)} - tied
    return f"it has no place for {min(left)}" if left else None
