"""Assemble a language model from plain arguments, refusing what cannot work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from moestro.experts import FeedForward
from moestro.layers import MoE
from moestro.methods import build
from moestro.models.arguments import feed_forward_size, resolve
from moestro.models.attention import GroupedQueryAttention
from moestro.models.decoder import Attention, Block, DecoderLM
from moestro.models.initialise import initialise
from moestro.models.latent import LatentAttention
from moestro.models.rope_scaling import yarn_temperature


def build_language_model(
    *,
    vocab_size: int,
    width: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    method: str | None = "mixtral",
    options: Mapping[str, Any] | None = None,
    num_experts: int = 8,
    expert_hidden: int | None = None,
    activation: str = "swiglu",
    dense_hidden: int | None = None,
    first_dense: int = 0,
    every: int = 1,
    attention: Literal["auto", "grouped-query", "latent"] = "auto",
    qk_norm: bool | Literal["none", "head", "full", "rotated"] = False,
    attention_bias: Literal["none", "qkv", "all"] = "none",
    attention_scale: float | None = None,
    windows: Sequence[int | None] | None = None,
    sinks: bool = False,
    q_lora_rank: int | None = None,
    kv_lora_rank: int | None = None,
    rope_dim: int | None = None,
    value_dim: int | None = None,
    tied_embeddings: bool = True,
    head_bias: bool = False,
    expert_bias: bool = False,
    rope_theta: float = 10000.0,
    rope_order: Literal["halves", "pairs"] = "halves",
    rope_scaling: Mapping[str, Any] | None = None,
    norm: Literal["rms", "layer"] = "rms",
    norm_place: Literal["before", "after", "both"] = "before",
    norm_eps: float = 1e-5,
    embedding_scale: float = 1.0,
    residual_scale: float = 1.0,
    logit_divisor: float = 1.0,
    max_length: int = 2048,
    kernel: str = "auto",
    seed: int | None = None,
) -> DecoderLM:
    """Build a decoder language model whose feed-forward layers are mixtures of experts, dense, or some of each.

    Args:
        vocab_size: token ids.
        width: model width.
        num_layers: layers.
        num_heads: query heads.
        num_kv_heads: key-value heads; None = num_heads.
        head_dim: features of a head; None = width / num_heads. For latent attention: the unrotated features.
        method: routing method (see `moestro.all_methods()`); None = every layer dense.
        options: options of the method.
        num_experts: routed experts in a layer.
        expert_hidden: hidden size of one expert; None = 8/3 width when gated, 4 width otherwise.
        activation: swiglu, geglu, clamped_swiglu (gated), relu, gelu, silu or squared_relu; for experts and dense
            layers.
        dense_hidden: hidden size of dense layers; None = as many parameters as a token uses in an MoE layer,
            or, without a method, as expert_hidden says.
        first_dense: the first n layers are dense.
        every: of the layers after those, every n-th is a mixture of experts.
        attention: grouped-query or latent; auto = latent for deepseek-v3.
        qk_norm: normalise queries and keys: False = "none", True = "head", "full" (all heads at once) or "rotated"
            (each head after rotation).
        attention_bias: maps of grouped-query attention that add one: none, those of queries, keys and values, or
            all.
        attention_scale: of its scores; None = 1 / sqrt(head_dim).
        windows: positions that a query sees, for each layer, its own included (None = all before it); None = all.
        sinks: whether each head has a learned sink, see `attend_with_sinks`.
        q_lora_rank: latent attention: size of the query latent; None = no query latent.
        kv_lora_rank: latent attention: size of the key-value latent; None = 2 head_dim.
        rope_dim: rotated features of a head; None = all, and of latent attention about head_dim / 2.
        value_dim: latent attention: features of a value head; None = head_dim.
        tied_embeddings: one matrix for input and output embeddings.
        head_bias: whether the output map adds one.
        expert_bias: whether the maps of experts do.
        rope_theta: base of the rotary positions.
        rope_order: which features of grouped-query attention turn together: i and i + rope_dim / 2, or neighbours.
        rope_scaling: for longer sequences than those of pretraining, see `rotary_frequencies`; None = none.
        norm: rms or layer.
        norm_place: of each layer's norms: before attention and feed-forward network, after them, or both.
        norm_eps: epsilon of the norms.
        embedding_scale: what embeddings are multiplied with.
        residual_scale: what each attention and feed-forward network is multiplied with before it is added.
        logit_divisor: what logits are divided by.
        max_length: most positions in a sequence.
        kernel: back end of the experts.
        seed: of the weights; None = torch's global generator.

    Raises:
        ValueError: sizes do not fit, the method is unknown or not causal, or no layer would have experts.
    """
    config: dict[str, Any] = dict(locals())
    del config["seed"]
    config["options"] = dict(options or {})
    resolve(config)
    with _seeded(seed):
        feed_forwards = _feed_forwards(config)
        blocks = [
            Block(_attention(config, index), layer, width, norm_eps, norm, norm_place, residual_scale)
            for index, layer in enumerate(feed_forwards)
        ]
        model = DecoderLM(
            vocab_size,
            blocks,
            width,
            max_length=max_length,
            rope_theta=rope_theta,
            eps=norm_eps,
            tied_embeddings=tied_embeddings,
            config=config,
            rope_scaling=rope_scaling,
            norm=norm,
            head_bias=head_bias,
            embedding_scale=embedding_scale,
            logit_scale=1 / logit_divisor,
        )
        initialise(model)
    return model


def _attention(config: Mapping[str, Any], layer: int) -> Attention:
    width, num_heads = config["width"], config["num_heads"]
    if config["attention"] == "latent":
        return LatentAttention(
            width,
            num_heads,
            q_lora_rank=config["q_lora_rank"],
            kv_lora_rank=config["kv_lora_rank"],
            nope_dim=config["head_dim"],
            rope_dim=config["rope_dim"],
            value_dim=config["value_dim"],
            temperature=yarn_temperature(config["rope_scaling"]),
        )
    return GroupedQueryAttention(
        width,
        num_heads,
        config["num_kv_heads"],
        config["head_dim"],
        config["qk_norm"],
        config["norm_eps"],
        bias=config["attention_bias"],
        rotary_dim=config["rope_dim"],
        rotation=config["rope_order"],
        scale=config["attention_scale"],
        window=config["windows"][layer] if config["windows"] else None,
        sinks=config["sinks"],
    )


def _feed_forwards(config: dict[str, Any]) -> list[nn.Module]:
    """The feed-forward network of every layer; sets `dense_hidden`."""
    width, activation = config["width"], config["activation"]
    sparse = {i: _moe(config) for i in sparse_layers(config)}
    if config["dense_hidden"] is None:
        config["dense_hidden"] = config["expert_hidden"]
        if sparse:
            active = next(iter(sparse.values())).parameter_counts().active
            config["dense_hidden"] = max(1, round(active / feed_forward_size(width, 1, activation)))
    return [
        sparse.get(i) or FeedForward(width, config["dense_hidden"], activation) for i in range(config["num_layers"])
    ]


def sparse_layers(config: Mapping[str, Any]) -> list[int]:
    """Indices of the layers that are mixtures of experts.

    Of the layers after the first `first_dense`, the last of every group of `every` (as in GShard and Qwen3-MoE).
    """
    if config["method"] is None:
        return []
    first, every, num_layers = config["first_dense"], config["every"], config["num_layers"]
    layers = list(range(first + every - 1, num_layers, every))
    if not layers:
        raise ValueError(
            f"first_dense={first} and every={every} leave no layer of {num_layers} with experts; "
            "lower one of them, or pass method=None for a dense model"
        )
    return layers


def _moe(config: Mapping[str, Any]) -> MoE:
    name, num_experts = config["method"], config["num_experts"]
    moe = build(
        name,
        width=config["width"],
        hidden=config["expert_hidden"],
        num_experts=num_experts,
        activation=config["activation"],
        bias=config["expert_bias"],
        kernel=config["kernel"],
        **config["options"],
    )
    if not moe.causal_evaluation:
        raise ValueError(
            f"{name} is not causal: later tokens change what earlier ones get, so a language model trained with it "
            "reads its own targets and cannot generate; choose a causal method such as mixtral"
        )
    return moe


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Draw from `seed` without moving torch's global generator; None draws from that one."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
