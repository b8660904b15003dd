"""The families of mixture-of-experts models in transformers and where each keeps its experts: one table.

Only this table knows names; everything else asks it. `transformers` is what `save_pretrained` writes, `fused` what
the modules hold in memory, `mergekit` what mergekit writes; the other layouts are the same tensors in a form that
tools ask for, and only moestro reads them back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from moestro.hf.layouts.forms import Form, Slot, one_by_one, projections, stacked, w1w2w3

STOCK = ("transformers", "fused", "mergekit")
PLAIN = ("per-expert", "w1w2w3", "transposed", "interleaved")
LAYOUTS = (*STOCK, *PLAIN)


@dataclass(frozen=True)
class Stack:
    """A pile of layers.

    Attributes:
        prefix: of the names of one layer.
        layers: config key of their number.
        hidden: config key of an expert's hidden size.
    """

    prefix: str
    layers: str
    hidden: str


@dataclass(frozen=True)
class Store:
    """Where and how one layer keeps its experts.

    Attributes:
        block: module of router and experts, below the layer.
        form: the tensors of the experts, below the block.
        router: weight of the router, below the block.
        beside: other tensors below the block that other layouts call differently, in a fixed order.
    """

    block: str
    form: Form
    router: str
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """What is special about one architecture.

    Attributes:
        model_type: of config.json.
        experts: config key of the number of experts in a layer.
        width: config key of the model width.
        stacks: its piles of layers.
        gated, biased: what experts look like.
        stores: by layout.
        opens: the layouts that stock transformers opens.
        hollow: config key of further experts that compute nothing but own (unused) gate and up matrices.
    """

    model_type: str
    experts: str
    width: str
    stacks: tuple[Stack, ...]
    gated: bool
    biased: bool
    stores: Mapping[str, Store]
    opens: tuple[str, ...]
    hollow: str | None = None


def _family(
    model_type: str,
    transformers: Store,
    fused: Store | None = None,
    *,
    experts: str = "num_experts",
    hidden: str = "intermediate_size",
    width: str = "hidden_size",
    stacks: tuple[Stack, ...] | None = None,
    gated: bool = True,
    biased: bool = False,
    mergekit: Store | None = None,
    hollow: str | None = None,
) -> Family:
    """Fill in what follows: the plain layouts, and a fused one for families that have none in transformers."""
    kind: dict[str, Any] = {"gated": gated, "biased": biased}
    memory = fused or Store(transformers.block, stacked(**kind), transformers.router, transformers.beside)
    plain = {
        "per-expert": projections(**kind),
        "w1w2w3": w1w2w3(**kind),
        "transposed": stacked(**kind, transposed=True),
        "interleaved": stacked(**kind, transposed=True, interleaved=gated),
    }
    stores = {"transformers": transformers, "fused": memory}
    stores |= {} if mergekit is None else {"mergekit": mergekit}
    stores |= {name: Store(memory.block, form, memory.router, memory.beside) for name, form in plain.items()}
    opens = ("transformers", *(["fused"] if fused else []), *(["mergekit"] if mergekit else []))
    layers = stacks or (Stack("model.layers.{layer}.", "num_hidden_layers", hidden),)
    return Family(model_type, experts, width, layers, gated, biased, MappingProxyType(stores), opens, hollow)


def _switch_like(model_type: str, transformers: Store, stacks: tuple[Stack, ...], *, biased: bool) -> Family:
    """Encoder and decoder, two matrices to an expert, every expert a module of its own."""
    return _family(
        model_type,
        transformers,
        experts="num_experts",
        width="d_model",
        stacks=stacks,
        gated=False,
        biased=biased,
    )


_MLP = Store("mlp.", projections(), "gate.weight")
_MLP_FUSED = Store("mlp.", stacked(), "gate.weight")
_FEED_FORWARD = Store("feed_forward.", projections(), "router.weight")
_FEED_FORWARD_FUSED = Store("feed_forward.", stacked(), "router.weight")
_MIXTRAL = Store("block_sparse_moe.", w1w2w3(), "gate.weight")
_GRANITE = Store(
    "block_sparse_moe.",
    (Slot("input_linear.weight", ("gate", "up")), Slot("output_linear.weight", ("down",))),
    "router.layer.weight",
)
_GRANITE_FUSED = Store("block_sparse_moe.", stacked(), "router.weight")
_GPT_OSS = Store("mlp.", stacked(biased=True, transposed=True, interleaved=True), "router.weight")
_LLAMA4 = Store("feed_forward.", stacked(transposed=True), "router.weight")
_FINE: dict[str, Any] = {"hidden": "moe_intermediate_size"}
_DEEPSEEK: dict[str, Any] = {"hidden": "moe_intermediate_size", "experts": "n_routed_experts"}
_LOCAL: dict[str, Any] = {"experts": "num_local_experts"}


def _qwen_like(model_type: str, router: str = "gate.weight", **rest: Any) -> Family:
    """Experts as gate_proj, up_proj and down_proj under `mlp.experts`."""
    return _family(model_type, Store("mlp.", projections(), router), Store("mlp.", stacked(), router), **rest)


_TABLE = (
    _family("mixtral", _MIXTRAL, _MLP_FUSED, mergekit=_MLP_FUSED, **_LOCAL),
    _family("phimoe", _MIXTRAL, Store("mlp.", stacked(), "router.weight"), **_LOCAL),
    _family("minimax_m2", _MIXTRAL, _MLP_FUSED, **_LOCAL),
    _family("qwen2_moe", _MLP, _MLP_FUSED, mergekit=_MLP, **_FINE),
    _family("qwen3_moe", _MLP, _MLP_FUSED, mergekit=_MLP_FUSED, **_FINE),
    _qwen_like("olmoe"),
    _qwen_like("flex_olmo"),
    _qwen_like("deepseek_v2", **_DEEPSEEK),
    _qwen_like("deepseek_v3", **_DEEPSEEK),
    _family("glm4_moe", _MLP, _MLP_FUSED, mergekit=_MLP_FUSED, **_DEEPSEEK),
    _qwen_like("dots1", **_DEEPSEEK),
    _family("gpt_oss", _GPT_OSS, _GPT_OSS, biased=True, **_LOCAL),
    _family("granitemoe", _GRANITE, _GRANITE_FUSED, **_LOCAL),
    _family("granitemoeshared", _GRANITE, _GRANITE_FUSED, **_LOCAL),
    _family("jamba", _FEED_FORWARD, _FEED_FORWARD_FUSED),
    _family(
        "lfm2_moe",
        Store("feed_forward.", w1w2w3(), "gate.weight"),
        Store("feed_forward.", stacked(), "gate.weight"),
        **_FINE,
    ),
    _qwen_like("afmoe", "router.gate.weight", **_FINE),
    _family(
        "ernie4_5_moe",
        Store("mlp.", projections(), "gate.weight", ("moe_statics.e_score_correction_bias",)),
        Store("mlp.", stacked(), "gate.weight", ("gate.moe_statics.e_score_correction_bias",)),
        experts="moe_num_experts",
        **_FINE,
    ),
    _qwen_like("hunyuan_v1_moe", "gate.wg.weight"),
    _family("llama4_text", _LLAMA4, _LLAMA4, mergekit=_LLAMA4, **_LOCAL),
    _family(
        "longcat_flash",
        Store("mlp.", projections(), "router.classifier.weight"),
        Store("mlp.", stacked(), "router.classifier.weight"),
        experts="n_routed_experts",
        stacks=(Stack("model.layers.{layer}.", "num_layers", "expert_ffn_hidden_size"),),
        hollow="zero_expert_num",
    ),
    _switch_like(
        "switch_transformers",
        Store(
            "mlp.",
            one_by_one({"up": "wi", "down": "wo"}, folder="experts.expert_{expert}."),
            "router.classifier.weight",
        ),
        (
            Stack("encoder.block.{layer}.layer.1.", "num_layers", "d_ff"),
            Stack("decoder.block.{layer}.layer.2.", "num_decoder_layers", "d_ff"),
        ),
        biased=False,
    ),
    _switch_like(
        "nllb-moe",
        Store(
            "ffn.",
            one_by_one({"up": "fc1", "down": "fc2"}, biased=True, folder="experts.expert_{expert}."),
            "router.classifier.weight",
        ),
        (
            Stack("model.encoder.layers.{layer}.", "encoder_layers", "encoder_ffn_dim"),
            Stack("model.decoder.layers.{layer}.", "decoder_layers", "decoder_ffn_dim"),
        ),
        biased=True,
    ),
)
FAMILIES: Mapping[str, Family] = MappingProxyType({family.model_type: family for family in _TABLE})


def find_family(model_type: str, names: Mapping[str, object]) -> Family:
    """The row of the table for a model.

    Args:
        model_type: of its config.json.
        names: its tensors; they tell a dense model from an unknown mixture.

    Raises:
        ValueError: no row.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    known = ", ".join(FAMILIES)
    if not any("expert" in name for name in names):
        raise ValueError(f"{model_type} is a dense model: none of its tensors is an expert's; pass one of {known}")
    raise ValueError(f"moestro does not know where {model_type} keeps its experts; it knows {known}")
