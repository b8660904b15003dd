"""What llama.cpp calls the tensors of the families that it computes as transformers does: one table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

FRAME = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_NORMS = {"attn_norm.weight": "input_layernorm.weight", "ffn_norm.weight": "post_attention_layernorm.weight"}
_GROUPED = {
    **{f"attn_{name}.weight": f"self_attn.{name}_proj.weight" for name in "qkv"},
    "attn_output.weight": "self_attn.o_proj.weight",
}
_QK_NORMS = {f"attn_{name}_norm.weight": f"self_attn.{name}_norm.weight" for name in "qk"}
_QKV_BIASES = {f"attn_{name}.bias": f"self_attn.{name}_proj.bias" for name in "qkv"}
_LATENT = {
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_q_a.weight": "self_attn.q_a_proj.weight",
    "attn_q_a_norm.weight": "self_attn.q_a_layernorm.weight",
    "attn_q_b.weight": "self_attn.q_b_proj.weight",
    "attn_kv_a_mqa.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attn_kv_a_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
}
_DENSE = {f"ffn_{name}.weight": f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
_ROUTER = {"ffn_gate_inp.weight": "mlp.gate.weight"}
_SELECTION_BIAS = {"exp_probs_b.bias": "mlp.gate.e_score_correction_bias"}


def _shared(module: str) -> dict[str, str]:
    return {f"ffn_{name}_shexp.weight": f"mlp.{module}.{name}_proj.weight" for name in ("gate", "up", "down")}


@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp.

    Attributes:
        name: as GGUF calls it.
        layer: names in a layer, GGUF's to those of transformers' disk layout; what a layer lacks is left out.
        requires: settings of config.json that it takes for granted.
        swapped: queries and keys turn neighbouring features, so their rows are in another order.
        latent: attention through latents, whose up-projection is stored in two parts.
        sigmoid: the router's scores are sigmoids, else a softmax.
        needs_head: the file must hold the output matrix even when it is the embedding's.
        dense_first: dense layers come first, experts are shared and weights scaled, as in DeepSeek.
        partial: a part of each head is rotated.
        own_keys: every head has keys and values of its own.
        told_by: settings of config.json that only a tensor's being there tells, by its name in the first layer.
    """

    name: str
    layer: Mapping[str, str]
    requires: Mapping[str, Any]
    swapped: bool = False
    latent: bool = False
    sigmoid: bool = False
    needs_head: bool = False
    dense_first: bool = False
    partial: bool = False
    own_keys: bool = False
    told_by: tuple[tuple[str, str], ...] = ()


EXPERTS = {"gate": "ffn_gate_exps.weight", "up": "ffn_up_exps.weight", "down": "ffn_down_exps.weight"}
KEY_UP, VALUE_UP, UP = "attn_k_b.weight", "attn_v_b.weight", "self_attn.kv_b_proj.weight"
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "mixtral": Architecture(
            "llama",
            {**_NORMS, **_GROUPED, "ffn_gate_inp.weight": "block_sparse_moe.gate.weight"},
            {"sliding_window": None, "hidden_act": "silu"},
            swapped=True,
        ),
        "qwen2_moe": Architecture(
            "qwen2moe",
            {
                **_NORMS,
                **_GROUPED,
                **_QKV_BIASES,
                **_ROUTER,
                **_shared("shared_expert"),
                "ffn_gate_inp_shexp.weight": "mlp.shared_expert_gate.weight",
            },
            {"norm_topk_prob": False, "use_sliding_window": False, "mlp_only_layers": [], "decoder_sparse_step": 1},
            needs_head=True,
            told_by=(("qkv_bias", "attn_q.bias"),),
        ),
        "qwen3_moe": Architecture(
            "qwen3moe",
            {**_NORMS, **_GROUPED, **_QK_NORMS, **_ROUTER},
            {"norm_topk_prob": True, "use_sliding_window": False, "mlp_only_layers": [], "decoder_sparse_step": 1},
        ),
        "olmoe": Architecture(
            "olmoe",
            {**_NORMS, **_GROUPED, **_QK_NORMS, **_ROUTER},
            {"norm_topk_prob": False, "clip_qkv": None},
            own_keys=True,
            needs_head=True,
        ),
        "deepseek_v3": Architecture(
            "deepseek2",
            {**_NORMS, **_LATENT, **_DENSE, **_ROUTER, **_SELECTION_BIAS, **_shared("shared_experts")},
            {"rope_interleave": True, "attention_bias": False},
            latent=True,
            sigmoid=True,
            needs_head=True,
            dense_first=True,
        ),
        "deepseek_v2": Architecture(
            "deepseek2",
            {**_NORMS, **_LATENT, **_DENSE, **_ROUTER, **_shared("shared_experts")},
            {"attention_bias": False, "norm_topk_prob": False, "topk_method": "greedy"},
            latent=True,
            needs_head=True,
            dense_first=True,
        ),
        "dots1": Architecture(
            "dots1",
            {
                **_NORMS,
                **_GROUPED,
                **_QK_NORMS,
                **_DENSE,
                **_ROUTER,
                **_SELECTION_BIAS,
                **_shared("shared_experts"),
            },
            {"attention_bias": False, "n_group": 1, "topk_group": 1},
            own_keys=True,
            sigmoid=True,
            needs_head=True,
            dense_first=True,
        ),
        "glm4_moe": Architecture(
            "glm4moe",
            {
                "attn_norm.weight": "input_layernorm.weight",
                "post_attention_norm.weight": "post_attention_layernorm.weight",
                **_GROUPED,
                **_QKV_BIASES,
                **_QK_NORMS,
                **_DENSE,
                **_ROUTER,
                **_SELECTION_BIAS,
                **_shared("shared_experts"),
            },
            {"n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0},
            sigmoid=True,
            needs_head=True,
            dense_first=True,
            partial=True,
            told_by=(("attention_bias", "attn_q.bias"), ("use_qk_norm", "attn_q_norm.weight")),
        ),
        "minimax_m2": Architecture(
            "minimax-m2",
            {
                **_NORMS,
                **_GROUPED,
                **_QK_NORMS,
                "ffn_gate_inp.weight": "block_sparse_moe.gate.weight",
                "exp_probs_b.bias": "block_sparse_moe.e_score_correction_bias",
            },
            {},
            sigmoid=True,
            needs_head=True,
            partial=True,
        ),
    }
)


def find_architecture(model_type: str) -> Architecture:
    """The row of a model type.

    Raises:
        ValueError: none.
    """
    if model_type not in ARCHITECTURES:
        raise ValueError(f"moestro writes and reads no {model_type} as GGUF; it knows {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[model_type]


def swap_rows(num_rows: int, num_heads: int) -> list[int]:
    """The order in which llama.cpp stores query and key rows that turn neighbouring features.

    transformers turns feature i with i + head_dim / 2; llama.cpp's llama turns 2i with 2i + 1.
    """
    size = num_rows // num_heads
    half = size // 2
    within = [place for pair in range(half) for place in (pair, pair + half)]
    return [head * size + place for head in range(num_heads) for place in within]
