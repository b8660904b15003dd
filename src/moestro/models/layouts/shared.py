"""What the layouts of DeepSeek's family share: dense layers first, and shared experts beside the routed ones."""

from __future__ import annotations

from typing import Any

from moestro.experts import FeedForward
from moestro.models.decoder import DecoderLM
from moestro.models.layouts.common import feed_forward_rules, layer_names, mixture_rules
from moestro.models.layouts.fits import dense_layers
from moestro.models.layouts.routing import BiasedSigmoidTopK, GroupedSoftmaxTopK
from moestro.models.layouts.rules import Rule, same


def dense_layers_first(model: DecoderLM) -> str | None:
    dense = dense_layers(model)
    return (
        None if dense == list(range(len(dense))) else f"its dense layers come first, but layers {dense} are dense"
    )


def plain_shared_experts(model: DecoderLM) -> str | None:
    plain = all(isinstance(block.moe.shared, FeedForward) for block in model.blocks if block.moe is not None)
    return None if plain else "it has shared experts without a gate; pass shared_experts >= 1"


def shared_or_none(model: DecoderLM) -> str | None:
    """The same shared experts in all mixtures, without a gate, or none in any."""
    shared = {
        each.hidden if isinstance(each, FeedForward) else each if each is None else "other"
        for each in (block.moe.shared for block in model.blocks if block.moe is not None)
    }
    return None if len(shared) == 1 and "other" not in shared else "it has shared experts without a gate, or none"


def shared_rules(model: DecoderLM) -> list[Rule]:
    """A whole model with shared experts, and the selection bias where routers have one."""
    table, state = mixture_rules(model), model.state_dict()
    for index, block in enumerate(model.blocks):
        if block.moe is None:
            continue
        ours, theirs = layer_names(index)
        if f"{ours}.moe.router.select.bias" in state:
            table.append(same(f"{ours}.moe.router.select.bias", f"{theirs}.mlp.gate.e_score_correction_bias"))
        table += feed_forward_rules(f"{ours}.moe.shared", f"{theirs}.mlp.shared_experts")
    return table


def latent_config(ours: dict[str, Any]) -> dict[str, Any]:
    """The entries of latent attention."""
    return {
        "q_lora_rank": ours["q_lora_rank"],
        "kv_lora_rank": ours["kv_lora_rank"],
        "qk_nope_head_dim": ours["head_dim"],
        "qk_rope_head_dim": ours["rope_dim"],
        "v_head_dim": ours["value_dim"],
    }


def mixture_config(model: DecoderLM, routing: BiasedSigmoidTopK | GroupedSoftmaxTopK | None) -> dict[str, Any]:
    """Entries about experts; a model without any needs none but the number of dense layers."""
    dense = {"first_k_dense_replace": len(dense_layers(model))}
    moe = next((block.moe for block in model.blocks if block.moe is not None), None)
    if moe is None:
        return dense
    assert routing is not None
    assert isinstance(moe.shared, FeedForward)
    return dense | {
        "moe_intermediate_size": model.config["expert_hidden"],
        "n_routed_experts": model.config["num_experts"],
        "num_experts_per_tok": routing.top_k,
        "n_shared_experts": moe.shared.hidden // model.config["expert_hidden"],
        "n_group": routing.num_groups,
        "topk_group": routing.groups_kept,
        "routed_scaling_factor": routing.scale,
    }


def biased_sigmoid_misfit(model: DecoderLM, routing: BiasedSigmoidTopK | None, layout: str) -> str | None:
    """Why a model does not route as DeepSeek-V3, with shared experts beside."""
    if all(block.moe is None for block in model.blocks):
        return None
    if routing is None:
        return f"{layout} routes by biased sigmoid scores and top-k"
    if model.config["num_experts"] < 2 * routing.num_groups:
        return "its groups are scored by their two best experts, so each needs two"
    return plain_shared_experts(model)
