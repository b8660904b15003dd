"""The sections of a recipe: their keys, defaults and what each may be; imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from moestro.train.mesh_words import mesh_words
from moestro.train.placement_words import NO_POLICY


class Section(BaseModel):
    """A part of a recipe: immutable, and a misspelt key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("neither true nor false is a value for it")
        return value


class ModelSection(Section):
    """The language model and the method that fills its MoE layers."""

    method: str | None = Field("mixtral", description="routing method; see `moestro methods`; null = dense")
    options: dict[str, Any] = Field(default_factory=dict, description="options of the method")
    num_experts: int = Field(16, ge=1, description="experts per MoE layer")
    expert_hidden: int = Field(256, ge=1, description="hidden size of one expert")
    dense_hidden: int | None = Field(
        None, ge=1, description="hidden size of dense layers; default: equal active size"
    )
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
    kernel: str = Field(
        "auto", description="back end of the experts: auto, fused, tiled, native, rounded, padded, loop, triton"
    )


class DataSection(Section):
    """The text to learn from."""

    paths: tuple[str, ...] = Field((), description="files, folders or globs; empty = Python's own library")
    tokenizer: str = Field("byte", description="byte, bpe:N to train one of N tokens, or a tokenizer.json")
    sequence_length: int = Field(256, ge=2, description="tokens in a sequence")
    validation_fraction: float = Field(0.1, gt=0, lt=1, description="share of documents kept for validation")

    @field_validator("paths", mode="before")
    @classmethod
    def _one_path(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class TrainSection(Section):
    """The optimiser and its schedule."""

    steps: int = Field(400, ge=1, description="optimiser steps")
    batch_size: int = Field(16, ge=1, description="sequences in an optimiser step")
    accumulate: int = Field(1, ge=1, description="micro-batches that the batch is split into")
    statistics: Literal["micro-batch", "step"] = Field(
        "micro-batch",
        description="tokens of an auxiliary loss; step = exact for any accumulate, one pass more",
    )
    layers: Literal["sum", "mean", "pooled"] = Field("sum", description="auxiliary losses of the layers together")
    learning_rate: float = Field(1.2e-3, gt=0, description="peak learning rate")
    schedule: Literal["cosine", "wsd", "constant"] = Field("cosine", description="learning rate after warm-up")
    warmup_fraction: float = Field(0.1, ge=0, lt=1, description="share of the steps that warms up linearly")
    decay_fraction: float = Field(0.2, gt=0, le=1, description="wsd: share of the steps that decays")
    final_fraction: float = Field(0.1, ge=0, le=1, description="learning rate at the end, as a share of the peak")
    weight_decay: float = Field(0.1, ge=0, description="AdamW weight decay of matrices")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW first-moment decay")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW second-moment decay")
    clip: float = Field(1.0, ge=0, description="gradient-norm clip; 0 = none")
    precision: Literal["auto", "float32", "bfloat16", "float64"] = Field(
        "auto", description="auto = bfloat16 if the hardware has it; float64 to compare runs to the last digit"
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    threads: int = Field(0, ge=0, description="CPU threads; 0 = OMP_NUM_THREADS if set, else every core")
    compile: bool = Field(False, description="torch.compile all but the MoE layers")
    evaluate_every: int = Field(100, ge=1, description="steps between evaluations")
    evaluation_batches: int = Field(20, ge=1, description="validation batches of an evaluation on the way")
    final_evaluation_batches: int = Field(0, ge=0, description="validation batches of the last evaluation; 0 = all")
    on_non_finite: Literal["halt", "skip", "rollback"] = Field(
        "halt",
        description="a bad loss or gradient: stop, leave the batch out, or do so from the last checkpoint",
    )
    check_every: int = Field(
        8,
        ge=0,
        description="steps in which each weight is looked at once for bad numbers, optimiser state being looked at "
        "every step; 0 = never",
    )
    checkpoint_every: int = Field(100, ge=0, description="steps between checkpoints; 0 = only when stopped")
    keep_last: int = Field(2, ge=1, description="newest checkpoints to keep")
    keep_best: bool = Field(False, description="also keep the checkpoint of the best evaluation on the way")
    keep_every: int = Field(0, ge=0, description="also keep the checkpoints at multiples of this step; 0 = none")
    log_every: int = Field(10, ge=1, description="steps between printed lines and routing records")

    @model_validator(mode="after")
    def _batch_splits_evenly(self) -> TrainSection:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size={self.batch_size} does not split into accumulate={self.accumulate} equal parts; "
                f"pass a batch_size that is a multiple of {self.accumulate}"
            )
        if self.schedule == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError(
                f"warmup_fraction={self.warmup_fraction} and decay_fraction={self.decay_fraction} "
                "together exceed the run; their sum must be at most 1"
            )
        return self


class PlacementSection(Section):
    """Which process holds which expert, decided anew as a run goes on; of an expert mesh of several processes."""

    policy: str | None = Field(None, description="placement policy, see docs/parallel.md; null = experts stay")
    every: int = Field(100, ge=1, description="steps between decisions")
    slots: int | None = Field(None, ge=1, description="experts that all processes hold, with replicas")
    predictor: str = Field("sliding-average", description="of the loads of the next steps")
    gain: float = Field(
        1.1, ge=1, description="experts move if the busiest process had so many times as much to do"
    )
    history: int = Field(1000, ge=1, description="steps whose loads are remembered")
    flops: float | None = Field(
        None, gt=0, description="flexmoe: products and sums of a process in a second; default: 11.5e12"
    )
    inside: float | None = Field(
        None, gt=0, description="flexmoe: bytes in a second between processes of a machine; default: 6.25e9"
    )
    between: float | None = Field(
        None, gt=0, description="flexmoe: bytes in a second between machines; default: 6.25e9"
    )

    @property
    def speeds(self) -> dict[str, float]:
        """Those of the machine that are given, by name."""
        given = {"flops": self.flops, "inside": self.inside, "between": self.between}
        return {name: speed for name, speed in given.items() if speed is not None}

    @field_validator("policy", mode="before")
    @classmethod
    def _none_is_no_policy(cls, value: Any) -> Any:
        return None if str(value).lower() in NO_POLICY else value

    @model_validator(mode="after")
    def _a_policy_makes_the_rest_matter(self) -> PlacementSection:
        if self.policy is None:
            for name, field in type(self).model_fields.items():
                if getattr(self, name) != field.default:
                    raise ValueError(f"{name} has no effect without a policy; name one, for example refined")
        return self


class ParallelSection(Section):
    """How several processes share a run; without effect in one. A run may go on with another section."""

    mesh: str = Field("auto", description="processes by axis, e.g. data=2,expert=2; auto = experts over most")
    transport: str = Field("linear", description="how tokens travel to their experts and back")
    shard_optimiser: bool = Field(False, description="every process keeps a share of the optimiser's state only")
    shard_dense: bool = Field(
        False, description="every process keeps a share of everything but the experts (FSDP2, ZeRO stage 3)"
    )
    timeout: float = Field(300.0, gt=0, description="seconds to wait for the other processes before giving up")
    placement: PlacementSection = Field(default_factory=lambda: PlacementSection.model_validate({}))

    @field_validator("mesh", mode="before")
    @classmethod
    def _known_axes(cls, value: Any) -> str:
        return mesh_words(value)
