"""Which layout a model is saved in: a stock one if it computes exactly this model, else our own."""

from __future__ import annotations

from dataclasses import dataclass

from moestro.models.decoder import DecoderLM
from moestro.models.layouts.deepseek_v2 import DEEPSEEK_V2
from moestro.models.layouts.deepseek_v3 import DEEPSEEK_V3
from moestro.models.layouts.dense import LLAMA, QWEN3
from moestro.models.layouts.dots1 import DOTS1
from moestro.models.layouts.ernie4_5_moe import ERNIE4_5_MOE
from moestro.models.layouts.flex_olmo import FLEX_OLMO
from moestro.models.layouts.glm4_moe import GLM4_MOE
from moestro.models.layouts.gpt_oss import GPT_OSS
from moestro.models.layouts.granitemoe import GRANITEMOE, GRANITEMOESHARED
from moestro.models.layouts.hunyuan_v1_moe import HUNYUAN_V1_MOE
from moestro.models.layouts.layout import Layout
from moestro.models.layouts.minimax_m2 import MINIMAX_M2
from moestro.models.layouts.mixtral import MIXTRAL
from moestro.models.layouts.olmoe import OLMOE
from moestro.models.layouts.own import OWN
from moestro.models.layouts.phimoe import PHIMOE
from moestro.models.layouts.qwen2_moe import QWEN2_MOE
from moestro.models.layouts.qwen3_moe import QWEN3_MOE


@dataclass(frozen=True)
class Choice:
    """The layout chosen and, in words, why."""

    layout: Layout
    reason: str


DENSE = (LLAMA, QWEN3, DEEPSEEK_V3)
SPARSE = (  # in order of preference
    MIXTRAL,
    QWEN3_MOE,
    OLMOE,
    DEEPSEEK_V3,
    DEEPSEEK_V2,
    DOTS1,
    QWEN2_MOE,
    GLM4_MOE,
    MINIMAX_M2,
    GRANITEMOE,
    GRANITEMOESHARED,
    GPT_OSS,
    HUNYUAN_V1_MOE,
    PHIMOE,
    FLEX_OLMO,
    ERNIE4_5_MOE,
)
LAYOUTS = {layout.model_type: layout for layout in (*DENSE, *SPARSE, OWN)}


def choose_layout(model: DecoderLM) -> Choice:
    """The first stock layout that computes exactly `model`, else our own, with the reason."""
    sparse = any(block.moe is not None for block in model.blocks)
    reasons: dict[str, list[str]] = {}
    for layout in SPARSE if sparse else DENSE:
        misfit = layout.why_not(model) or _unmapped(layout, model)
        if misfit is None:
            return Choice(layout, f"{layout.name} computes exactly this model")
        reasons.setdefault(misfit, []).append(layout.name)
    return Choice(OWN, "; ".join(f"not {', '.join(names)}: {misfit}" for misfit, names in reasons.items()))


def _unmapped(layout: Layout, model: DecoderLM) -> str | None:
    """A tensor that the layout has no place for."""
    tied = {"head.weight"} if model.config["tied_embeddings"] else set()
    left = set(model.state_dict()) - {name for rule in layout.rules(model) for name in rule.ours} - tied
    return f"it has no place for {min(left)}" if left else None
