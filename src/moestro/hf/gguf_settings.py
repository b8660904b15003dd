"""config.json and tokenizer.json as the settings of a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moestro.hf.gguf_pieces import BYTES, is_sentencepiece, sentencepiece_settings
from moestro.hf.gguf_table import Architecture

CONFIG, TOKENIZER = "moestro.config", "tokenizer.huggingface.json"  # ours, and the format's own
KINDS = {"normal": 1, "unknown": 2, "control": 3, "user": 4, "unused": 5, "byte": 6}
#: what llama.cpp's YaRN takes for granted; None = by the formula of the paper
YARN = {"beta_fast": 32, "beta_slow": 1, "attention_factor": None, "mscale": None, "truncate": True}
#: llama.cpp wants merges and GGUF has no empty lists: this one joins two zero bytes to no token, so they stay two
NO_MERGES = ["\u0100 \u0100"]
LOG_MULTIPLIER = "rope.scaling.yarn_log_multiplier"
GATES = {"softmax": 1, "sigmoid": 2}  # llama.cpp's numbers
NEXT_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


def check_config(config: Mapping[str, Any], architecture: Architecture) -> None:
    """Refuse what llama.cpp would compute differently.

    Raises:
        ValueError: a setting that the architecture takes for granted is another one.
    """
    model_type = config["model_type"]
    for key, expected in architecture.requires.items():
        actual = config.get(key, expected)
        if actual != expected:
            raise ValueError(
                f"llama.cpp computes {model_type} with {key}={expected!r}, but config.json says {actual!r}"
            )
    heads, key_heads = config["num_attention_heads"], config.get("num_key_value_heads")
    if architecture.own_keys and key_heads not in (None, heads):
        raise ValueError(
            f"llama.cpp gives each of the {heads} heads of {model_type} keys of its own, but config.json says "
            f"num_key_value_heads={key_heads}"
        )
    kinds = set(config.get("layer_types") or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ValueError(f"llama.cpp computes {model_type} in full attention, but config.json has {sorted(kinds)}")
    check_rope(rope_of(config), architecture)
    if architecture.latent and config["q_lora_rank"] is None and config["num_hidden_layers"] not in (26, 27):
        raise ValueError(
            "llama.cpp reads a DeepSeek without query latents only with 26 or 27 layers, not "
            f"{config['num_hidden_layers']}"
        )
    if architecture.latent and config.get("num_nextn_predict_layers"):
        raise ValueError("moestro writes no further prediction layers into GGUF; set num_nextn_predict_layers to 0")


def check_rope(rope: Mapping[str, Any], architecture: Architecture) -> None:
    """Refuse rotary positions that llama.cpp turns otherwise; of scaled ones it shares YaRN, outside DeepSeek."""
    kind = rope.get("rope_type", "default")
    if kind == "yarn" and architecture.latent:
        _check_latent_yarn(rope)
        rope = {**rope, "mscale": None}
    if kind not in ("default", "yarn"):
        raise ValueError(f"moestro writes no {kind} rotary scaling into GGUF, only the default one and yarn")
    if kind == "yarn" and "original_max_position_embeddings" not in rope:
        raise ValueError("config.json asks for yarn without original_max_position_embeddings; add it")
    for key, expected in YARN.items():
        actual = rope.get(key)
        if kind == "yarn" and actual is not None and actual != expected:
            raise ValueError(f"llama.cpp's yarn has {key}={expected!r}, but config.json says {actual!r}")


def _check_latent_yarn(rope: Mapping[str, Any]) -> None:
    """DeepSeek's scales the scores by `mscale_all_dim`; llama.cpp has no second constant for the turns."""
    own, everywhere = rope.get("mscale"), rope.get("mscale_all_dim")
    if not own or own != everywhere:
        raise ValueError(
            f"llama.cpp's yarn of DeepSeek has mscale equal to mscale_all_dim, but config.json says {own} and "
            f"{everywhere}"
        )


def rope_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rotary settings, wherever this version of transformers keeps them."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = {"rope_type": rope["type"]} if "type" in rope else {}  # as older configurations say it
    return {"rope_theta": config.get("rope_theta", 10000.0), **kind, **rope}


def to_settings(config: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """The settings `{name}.*` that llama.cpp reads."""
    heads = config["num_attention_heads"]
    settings = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "vocab_size": config["vocab_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads") or heads,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(rope_of(config)["rope_theta"]),
        **_expert_settings(config),
        **_rope_settings(rope_of(config)),
    }
    settings |= _latent_settings(config) if architecture.latent else _head_settings(config, architecture)
    settings |= _dense_first_settings(config) if architecture.dense_first else {}
    if architecture.dense_first or architecture.sigmoid:
        settings["expert_gating_func"] = GATES["sigmoid" if architecture.sigmoid else "softmax"]
    return {f"{architecture.name}.{key}": value for key, value in settings.items()}


def _rope_settings(rope: Mapping[str, Any]) -> dict[str, Any]:
    """YaRN's; both sides compute the other constants from these two (Peng et al. 2023)."""
    if rope.get("rope_type") != "yarn":
        return {}
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rope["factor"]),
        "rope.scaling.original_context_length": int(rope["original_max_position_embeddings"]),
        **({LOG_MULTIPLIER: 0.1 * rope["mscale_all_dim"]} if rope.get("mscale_all_dim") else {}),
    }


def _expert_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    counts = [config.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts")]
    settings = {
        "expert_count": next(count for count in counts if count is not None),
        "expert_used_count": config["num_experts_per_tok"],
        "expert_feed_forward_length": config.get("moe_intermediate_size") or config["intermediate_size"],
    }
    if config.get("shared_expert_intermediate_size"):
        settings["expert_shared_feed_forward_length"] = config["shared_expert_intermediate_size"]
    return settings


def _head_settings(config: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    share = rope_of(config).get("partial_rotary_factor", 1.0) if architecture.partial else 1.0
    return {
        "attention.key_length": size,
        "attention.value_length": size,
        "rope.dimension_count": int(size * share),
    }


def _dense_first_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What DeepSeek's routing and those after it have beside others."""
    settings = {
        "leading_dense_block_count": config["first_k_dense_replace"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_weights_scale": float(config["routed_scaling_factor"]),
        "expert_weights_norm": bool(config["norm_topk_prob"]),
    }
    if (config.get("n_group") or 1) > 1:
        settings |= {"expert_group_count": config["n_group"], "expert_group_used_count": config["topk_group"]}
    return settings


def _latent_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSeek: to llama.cpp all heads share one key, the latent with the rotated features in front."""
    rotated, rank = config["qk_rope_head_dim"], config["kv_lora_rank"]
    settings = {
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": rank,
        "attention.key_length": rank + rotated,
        "attention.value_length": rank,
        "attention.key_length_mla": config["qk_nope_head_dim"] + rotated,
        "attention.value_length_mla": config["v_head_dim"],
        "rope.dimension_count": rotated,
    }
    if config["q_lora_rank"] is not None:
        settings["attention.q_lora_rank"] = config["q_lora_rank"]
    return settings


def tokenizer_settings(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer of a folder as GGUF has it: ids, merges and special tokens.

    Raises:
        ValueError: no tokenizer.json, or one that is neither byte-level BPE nor like SentencePiece's.
    """
    from moestro.data import open_tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no tokenizer.json, which a GGUF file needs; put the model's own there")
    content = json.loads(path.read_text(encoding="utf-8"))
    pieces = is_sentencepiece(content)
    if not pieces:
        open_tokenizer(folder)  # says what is wrong with a tokenizer that is not byte-level
    tokens, kinds = _tokens(content, int(config["vocab_size"]), path)
    settings: dict[str, Any] = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        **(sentencepiece_settings(content, tokens, path) if pieces else _byte_level(content, path)),
        TOKENIZER: json.dumps(content, ensure_ascii=False),
    }
    for key, name in NEXT_IDS.items():
        value = config.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int) and 0 <= value < len(tokens):
            settings[f"tokenizer.ggml.{name}_token_id"] = value
    return settings


def _byte_level(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"].get("merges", [])]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre_tokenizer(content, path) if merges else "gpt-2",
        "tokenizer.ggml.merges": merges or NO_MERGES,
        "tokenizer.ggml.add_bos_token": False,
    }


def _tokens(content: Mapping[str, Any], vocab_size: int, path: Path) -> tuple[list[str], list[int]]:
    """Every id of the model; those that the tokenizer does not have are unused."""
    tokens = [f"<|unused {index}|>" for index in range(vocab_size)]
    kinds = [KINDS["unused"]] * vocab_size
    byte, unknown = set(BYTES) if is_sentencepiece(content) else set(), content["model"].get("unk_token")
    entries = [
        (text, index, "byte" if text in byte else "normal") for text, index in content["model"]["vocab"].items()
    ]
    entries += [(t["content"], t["id"], "control" if t.get("special") else "user") for t in content["added_tokens"]]
    for text, index, kind in entries:
        if not 0 <= index < vocab_size:
            raise ValueError(f"{path} has the token {text!r} with id {index}, but the model has {vocab_size} ids")
        tokens[index], kinds[index] = text, KINDS["unknown" if byte and text == unknown else kind]
    return tokens, kinds


def _pre_tokenizer(content: Mapping[str, Any], path: Path) -> str:
    """llama.cpp's name of the way in which text is cut before merging."""
    pre = content.get("pre_tokenizer") or {}
    if pre.get("type") == "ByteLevel" and pre.get("use_regex", True) and not pre.get("add_prefix_space"):
        return "gpt-2"
    raise ValueError(
        f"{path} cuts text in a way that moestro cannot name in GGUF; it names GPT-2's (ByteLevel with its regex)"
    )
