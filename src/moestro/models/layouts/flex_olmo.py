"""The layout of FlexOlmo: OLMoE with its norms after attention and experts."""

from __future__ import annotations

from typing import Any

from moestro.models.decoder import DecoderLM
from moestro.models.layouts.common import mixture_rules
from moestro.models.layouts.fits import word_is
from moestro.models.layouts.layout import Layout
from moestro.models.layouts.olmoe import config as olmoe_config
from moestro.models.layouts.olmoe import misfit as olmoe_misfit


def misfit(model: DecoderLM) -> str | None:
    return word_is(model, "norm_place", ("after",), "FlexOlmo") or olmoe_misfit(model)


def config(model: DecoderLM) -> dict[str, Any]:
    return {key: value for key, value in olmoe_config(model).items() if key != "clip_qkv"}


FLEX_OLMO = Layout(
    "FlexOlmo", "flex_olmo", "FlexOlmoForCausalLM", misfit, mixture_rules, config, says=frozenset({"norm_place"})
)
