"""What a training run needs, as one frozen value read from a YAML recipe; imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A part of a recipe: immutable, and a misspelt key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSection(Section):
    """The language model and the method that fills its MoE layers."""

    method: str | None = Field("mixtral", description="routing method; see `moestro methods`; null = dense")
    options: dict[str, Any] = Field(default_factory=dict, description="options of the method")
    num_experts: int = Field(16, ge=1, description="experts per MoE layer")
    expert_hidden: int = Field(256, ge=1, description="hidden size of one expert")
    dense_hidden: int | None = Field(None, ge=1, description="hidden size of dense layers; default: equal active parameters")
    activation: str = Field("swiglu", description="swiglu, geglu, relu, gelu, silu or squared_relu")
    width: int = Field(192, ge=1, description="model width")
    num_layers: int = Field(4, ge=1, description="transformer layers")
    num_heads: int = Field(4, ge=1, description="query heads")
    num_kv_heads: int | None = Field(None, ge=1, description="key-value heads; default: as many as query heads")
    head_dim: int | None = Field(None, ge=1, description="width of a head; default: width / num_heads")
    first_dense: int = Field(0, ge=0, description="the first n layers are dense")
    every: int = Field(1, ge=1, description="MoE on every n-th layer")
    attention: Literal["auto", "grouped-query", "latent"] = Field("auto", description="attention of every layer")
    qk_norm: bool = Field(False, description="RMSNorm on queries and keys")
    tied_embeddings: bool = Field(True, description="input and output embeddings share one matrix")
    rope_theta: float = Field(10000.0, gt=0, description="base of the rotary positions")
    kernel: str = Field("auto", description="back end of the experts: auto, native, padded or loop")


class DataSection(Section):
    """The text to learn from."""

    paths: tuple[str, ...] = Field((), description="files, folders or globs; empty = Python's own library and topics")
    tokenizer: str = Field("byte", description="byte, bpe:N to train one of N tokens, or a tokenizer.json")
    sequence_length: int = Field(256, ge=2, description="tokens in a sequence")
    validation_fraction: float = Field(0.1, gt=0, lt=1, description="share of documents kept for validation")


class TrainSection(Section):
    """The optimiser and its schedule."""

    steps: int = Field(400, ge=1, description="optimiser steps")
    batch_size: int = Field(16, ge=1, description="sequences in an optimiser step")
    accumulate: int = Field(1, ge=1, description="micro-batches that the batch is split into")
    learning_rate: float = Field(3e-3, gt=0, description="peak learning rate")
    schedule: Literal["cosine", "wsd", "constant"] = Field("cosine", description="learning-rate schedule after warm-up")
    warmup: int = Field(40, ge=0, description="steps of linear warm-up")
    decay_fraction: float = Field(0.2, gt=0, le=1, description="wsd: share of the steps that decays")
    final_fraction: float = Field(0.1, ge=0, le=1, description="learning rate at the end, as a share of the peak")
    weight_decay: float = Field(0.1, ge=0, description="AdamW weight decay of matrices")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW first-moment decay")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW second-moment decay")
    clip: float = Field(1.0, ge=0, description="gradient-norm clip; 0 = none")
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="autocast; auto = bfloat16 where the processor has it")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    threads: int = Field(0, ge=0, description="CPU threads; 0 = every core")
    compile: bool = Field(False, description="torch.compile the model")
    evaluate_every: int = Field(100, ge=1, description="steps between evaluations")
    evaluation_batches: int = Field(20, ge=1, description="validation batches per evaluation; the last one uses all")
    log_every: int = Field(10, ge=1, description="steps between printed lines and routing records")


class Recipe(Section):
    """A whole run: `moestro train RECIPE.yaml` reads it, the run folder keeps it resolved."""

    seed: int = Field(0, ge=0, description="seed of weights, data order and routing noise")
    twin: bool = Field(True, description="also train the dense twin of equal active parameters")
    model: ModelSection = Field(default_factory=ModelSection)
    data: DataSection = Field(default_factory=DataSection)
    train: TrainSection = Field(default_factory=TrainSection)
