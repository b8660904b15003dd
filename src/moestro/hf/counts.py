"""Parameters and FLOPs of a model from its config.json alone.

Architectures of transformers are laid out on the meta device, where a tensor has a name and a shape but no memory;
the few released ones that transformers does not have are in `moestro.hf.unlisted`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from moestro.hf.layouts.folder import read_config_file
from moestro.hf.unlisted import UNLISTED

MAX_LAYERS, MAX_EXPERTS, MAX_WIDTH = 2_000, 100_000, 10_000_000
TOP_K = ("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "num_selected_experts")
NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
FIXED_TOP_K = {"switch_transformers": 1, "nllb-moe": 2}
COMPONENTS = ("embedding", "attention", "norm", "router", "experts", "shared", "dense", "mixer")


@dataclass(frozen=True)
class Part:
    """Parameters that belong together.

    Attributes:
        component: one of `COMPONENTS`.
        total: parameters.
        active: those that one token uses; a share of each expert.
        flops: multiplications and additions for one token: two for every entry of a matrix that it meets.
    """

    component: str
    total: int
    active: Fraction | int
    flops: Fraction | int


@dataclass(frozen=True)
class StockCounts:
    """What a configuration describes.

    Attributes:
        model_type: of config.json.
        total: parameters; tied ones once, buffers not at all.
        active: those that one token uses: everything but the experts that it does not visit.
        components: total by component.
        active_components: active by component.
        flops_per_token: of the forward pass at `length` tokens; a training step takes three times as many.
        length: tokens of a sequence; every token meets all of them in attention (masked pairs count too).
    """

    model_type: str
    total: int
    active: int
    components: dict[str, int]
    active_components: dict[str, int]
    flops_per_token: int
    length: int


def count_config(config: str | Path | Mapping[str, Any], *, length: int = 2048) -> StockCounts:
    """Count the parameters and FLOPs of a model that a config.json describes.

    Args:
        config: the file, its folder, or its content.
        length: tokens of a sequence, for the FLOPs of attention.

    Raises:
        ValueError: no such file, an unknown architecture, code in the configuration, or absurd sizes.
    """
    content = dict(config) if isinstance(config, Mapping) else read_config_file(config_path(Path(config)))
    _check_sizes(content)
    model_type = str(content["model_type"])
    if model_type == "moestro":
        return _count_ours(content, length)
    if model_type in UNLISTED:
        parts = [Part(*part) for part in UNLISTED[model_type](content)]
        pairs = _pairs(content, int(content["num_hidden_layers"]))
    else:
        model = _outline(content)
        if model is None:
            raise ValueError(f"{model_type} is no language model; moestro counts causal and encoder-decoder ones")
        parts = list(_parts(model))
        pairs = _pairs(model.config.to_dict() | {"head_dim": _head_dim(model.config)}, _attention_layers(model))
    return StockCounts(
        model_type,
        sum(part.total for part in parts),
        int(sum(part.active for part in parts)),
        _by_component(parts, "total"),
        _by_component(parts, "active"),
        int(sum(part.flops for part in parts)) + pairs * length,
        length,
    )


def _count_ours(content: dict[str, Any], length: int) -> StockCounts:
    """A model of our own layout knows its counts."""
    from moestro.hf.auto import MoestroForCausalLM

    model = _outline(content)
    assert isinstance(model, MoestroForCausalLM)
    counts, flops = model.decoder.parameter_counts(), model.decoder.flops_per_token(length)
    return StockCounts(
        "moestro", counts.total, counts.active, counts.components, counts.active_components, flops, length
    )


def config_path(path: Path) -> Path:
    """The config.json at a path, which may be its folder."""
    return path / "config.json" if path.is_dir() else path


def _check_sizes(config: Mapping[str, Any]) -> None:
    """Numbers that no model has are refused before a single module is made."""
    for key, value in config.items():
        if type(value) is not int:
            continue
        limit = MAX_LAYERS if "layers" in key else MAX_EXPERTS if "expert" in key else MAX_WIDTH
        if not -limit <= value <= limit:
            raise ValueError(f"config.json says {key}={value}; moestro counts models up to {limit} there")


def _outline(content: dict[str, Any]) -> Any:
    """The model on the meta device: names and shapes, no weights."""
    import torch
    import transformers

    model_type = content["model_type"]
    if model_type not in transformers.CONFIG_MAPPING:
        known = ", ".join(UNLISTED)
        raise ValueError(
            f"transformers {transformers.__version__} has no architecture {model_type!r}; "
            f"moestro also counts {known}"
        )
    rest = {key: value for key, value in content.items() if key not in ("model_type", "quantization_config")}
    try:
        config = transformers.AutoConfig.for_model(model_type, **rest)
        auto = _auto_class(transformers, type(config))
        with torch.device("meta"):
            return None if auto is None else auto.from_config(config)
    except Exception as error:  # whatever an architecture makes of numbers that it was not written for
        raise ValueError(f"config.json does not describe a {model_type}: {error}") from None


def _auto_class(transformers: Any, kind: type) -> Any:
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM):
        if kind in auto._model_mapping:
            return auto
    return None


def _parts(model: Any) -> Iterator[Part]:
    head, banks = model.get_output_embeddings(), _banks(model)
    head_weight = None if head is None else head.weight
    for name, parameter in model.named_parameters():
        component, total = _component(name, banks), parameter.numel()
        active = total if component != "experts" else _active(name, parameter, banks, model.config)
        matrix = parameter.dim() >= 2 and not name.endswith("bias")
        looked_up = component == "embedding" and parameter is not head_weight
        yield Part(component, total, active, 2 * active if matrix and not looked_up else 0)


def _banks(model: Any) -> dict[str, int]:
    """The modules that hold experts, by name, with the number of modules in them (0 = experts are stacked)."""
    found = {}
    for name, module in model.named_modules():
        if name.endswith(".experts") or type(module).__name__.endswith("ParallelExperts"):
            found[name] = 0 if list(module.parameters(recurse=False)) else _owners(module)
    return found


def _owners(module: Any) -> int:
    """Children that have parameters."""
    return sum(next(child.parameters(), None) is not None for child in module.children())


def _bank_of(name: str, banks: Mapping[str, int]) -> str | None:
    """The innermost bank above a parameter."""
    prefix = name
    while "." in prefix:
        prefix = prefix.rpartition(".")[0]
        if prefix in banks and not any(other.startswith(f"{prefix}.") for other in banks):
            return prefix
    return None


def _active(name: str, parameter: Any, banks: Mapping[str, int], config: Any) -> Fraction:
    """The share of the chosen experts: stacked along the first axis, separate modules, or rows of a matrix."""
    bank = _bank_of(name, banks)
    assert bank is not None
    experts = _first(config, NUM_EXPERTS)
    if banks[bank] > 1:
        experts = banks[bank]
    elif parameter.dim() == 3:
        experts = parameter.shape[0]  # may hold experts that compute nothing
    return Fraction(parameter.numel() * min(_top_k(config), experts), experts)


def _component(name: str, banks: Mapping[str, int]) -> str:
    words = [word for word in name.split(".")[:-1] if not word.isdecimal()]
    if _bank_of(name, banks) is not None:
        return "experts"
    if any(word in ("embed_tokens", "lm_head", "wte", "shared", "embed_positions") for word in words):
        return "embedding"
    if "norm" in words[-1]:
        return "norm"
    if any("shared" in word for word in words):
        return "shared"
    if any("router" in word for word in words) or "gate" in words:
        return "router"
    if any(word in ("mamba", "conv") for word in words):
        return "mixer"
    return "attention" if any("att" in word.lower() for word in words) else "dense"


def _top_k(config: Any) -> int:
    """Experts per token."""
    return FIXED_TOP_K.get(config.model_type) or _first(config, TOP_K)


def _first(config: Any, keys: tuple[str, ...]) -> int:
    places = (config, getattr(config, "ffn_config", None))  # DBRX keeps its experts apart
    values = [getattr(place, key, None) for key in keys for place in places]
    found = [value for value in values if isinstance(value, int) and value > 0]
    if not found:
        raise ValueError(f"config.json of this {config.model_type} says none of {', '.join(keys)}")
    return found[0]


def _head_dim(config: Any) -> int:
    head_dim = getattr(config, "head_dim", None)
    if isinstance(head_dim, int):
        return head_dim
    return int(getattr(config, "hidden_size", 0)) // max(1, int(getattr(config, "num_attention_heads", 1)))


def _attention_layers(model: Any) -> int:
    """Modules that own a value projection meet every pair of tokens."""
    names = ("v_proj", "kv_b_proj", "v", "Wqkv", "qkv_proj", "kv_proj")
    return sum(any(hasattr(module, name) for name in names) for module in model.modules())


def _pairs(config: Mapping[str, Any], layers: int) -> int:
    """FLOPs for one query meeting one key, over all heads and layers."""
    heads = int(config.get("num_attention_heads") or config.get("num_heads") or 0)
    size = config.get("head_dim") or config.get("d_kv") or 0
    if config.get("qk_nope_head_dim") is not None:
        query = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
        return 2 * layers * heads * (query + config["v_head_dim"])
    return 4 * layers * heads * int(size or int(config.get("hidden_size", 0)) // max(1, heads))


def _by_component(parts: list[Part], field: str) -> dict[str, int]:
    sums = {n: int(sum(getattr(part, field) for part in parts if part.component == n)) for n in COMPONENTS}
    return {name: value for name, value in sums.items() if value}
