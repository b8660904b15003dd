"""What a training run needs, as one frozen value read from a YAML recipe; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from moestro.train.mesh_words import mesh_words
from moestro.train.placement_words import NO_POLICY, check_placement, without_idle_placement
from moestro.train.recipe_errors import did_you_mean, first_error, sentence
from moestro.train.yaml_source import RecipeError, YamlSource, read_yaml

__all__ = [
    "DataSection",
    "ModelSection",
    "ParallelSection",
    "PlacementSection",
    "Recipe",
    "RecipeError",
    "TrainSection",
]
__all__ += ["dump_recipe", "load_recipe", "shipped_recipes"]


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


class Recipe(Section):
    """A whole run: `moestro train RECIPE.yaml` reads it, the run folder keeps it resolved."""

    seed: int = Field(0, ge=0, description="seed of weights, data order and routing noise")
    twin: bool = Field(True, description="also train the dense twin of equal active parameters")
    model: ModelSection = Field(default_factory=lambda: ModelSection.model_validate({}))
    data: DataSection = Field(default_factory=lambda: DataSection.model_validate({}))
    train: TrainSection = Field(default_factory=lambda: TrainSection.model_validate({}))
    parallel: ParallelSection = Field(default_factory=lambda: ParallelSection.model_validate({}))


def load_recipe(path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe from a YAML file, with some of its values replaced.

    Args:
        path: a YAML file, the name of a shipped recipe such as `first`, or None for the default recipe.
        overrides: values that replace the file's, nested `{"train": {"steps": 5}}` or dotted `{"train.steps": 5}`.
            Another method than the file's takes the file's options of its own method away.

    Raises RecipeError, one sentence that names the file, the line and the key, for an unknown key, a wrong type,
    a value out of range, an unknown method or an option that the method does not take.
    """
    source = read_yaml(find_recipe(path))
    if "methods" in source.values:
        raise RecipeError(f"{source.place(('methods',))}: this is the recipe of a study; use `moestro study`")
    given = _nested(overrides or {})
    below = without_idle_placement(_without_foreign_options(source.values, given), given)
    recipe = _validated(_merged(below, given), _Places(source, given))
    _check_method(recipe.model, _Places(source, given))
    _check_transport(recipe.parallel, _Places(source, given))
    _check_sharing(recipe, _Places(source, given))
    check_placement(
        recipe.parallel.placement, lambda key: _Places(source, given).of(("parallel", "placement", key))
    )
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every value written out; `load_recipe` reads it back unchanged."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "recipes", package.parents[1] / "recipes"):  # a wheel, a checkout
        if folder.is_dir():
            return {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    return {}


@dataclass(frozen=True)
class _Places:
    """Where each value came from, for error messages."""

    source: YamlSource
    overrides: Mapping[str, Any]

    def of(self, key: tuple[str | int, ...]) -> str:
        return "--" + ".".join(map(str, key)) if self._overridden(key) else self.source.place(key)

    def _overridden(self, key: tuple[str | int, ...]) -> bool:
        value: Any = self.overrides
        for part in key:
            if not isinstance(value, Mapping):
                return True  # a whole value was replaced, this is a part of it
            if part not in value:
                return False
            value = value[part]
        return bool(key) and not isinstance(value, Mapping)


def find_recipe(path: str | Path | None) -> Path:
    """The file of a recipe: a path, the name of a shipped one, or None for the default; RecipeError if absent."""
    shipped = shipped_recipes()
    if path is None or (str(path) in shipped and not Path(path).exists()):
        name = "first" if path is None else str(path)
        if name not in shipped:
            raise RecipeError("the default recipe is missing from this installation; name a recipe file")
        return shipped[name]
    if not Path(path).exists():
        hint = did_you_mean(Path(path).stem, shipped)
        raise RecipeError(f"no recipe at {path}; shipped recipes: {', '.join(shipped) or 'none'}{hint}")
    return Path(path)


def _nested(overrides: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in overrides.items():
        first, _, rest = str(key).partition(".")
        value = _nested({rest: value} if rest else value) if rest or isinstance(value, Mapping) else value
        result = _merged(result, {first: value})
    return result


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        result[key] = _merged(old, value) if both else value  # type: ignore[arg-type]
    return result


def _without_foreign_options(values: Mapping[str, Any], given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The file's values; options that it gives its own method are not for the method that replaces it."""
    model, above = values.get("model"), given.get("model")
    if not isinstance(model, Mapping) or not isinstance(above, Mapping) or "method" not in above:
        return values
    if above["method"] == model.get("method", ModelSection.model_fields["method"].default):
        return values
    return {**values, "model": {key: value for key, value in model.items() if key != "options"}}


def _validated(values: Mapping[str, Any], places: _Places) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        first = first_error(error)
        raise RecipeError(f"{places.of(first['loc'])}: {sentence(first, Recipe)}") from None


def _check_method(model: ModelSection, places: _Places) -> None:
    """The method and its options exist; only here is torch needed."""
    if model.method is None:
        if model.options:
            raise RecipeError(f"{places.of(('model', 'options'))}: model.options needs a model.method")
        return
    from moestro.methods import all_methods

    methods = all_methods()
    if model.method not in methods:
        hint = did_you_mean(model.method, methods) or f"; there are {', '.join(methods)}"
        raise RecipeError(f"{places.of(('model', 'method'))}: unknown method {model.method!r}{hint}")
    known = methods[model.method].options
    for name, value in model.options.items():
        where = places.of(("model", "options", name))
        if name not in known:
            hint = did_you_mean(name, known) or f"; it takes {', '.join(known) or 'none'}"
            raise RecipeError(f"{where}: {model.method} has no option {name!r}{hint}")
        try:
            known[name].parse(value)
        except ValueError as error:
            raise RecipeError(f"{where}: {model.method} {error}") from None


def _check_sharing(recipe: Recipe, places: _Places) -> None:
    if recipe.parallel.shard_dense and recipe.train.compile:
        key = places.of(("parallel", "shard_dense"))
        raise RecipeError(
            f"{key}: train.compile does not know a dense part that is shared out; leave one of them out"
        )


def _check_transport(section: ParallelSection, places: _Places) -> None:
    """The transport exists; torch is needed for any but the default."""
    if section.transport == ParallelSection.model_fields["transport"].default:
        return
    from moestro.parallel import all_transports

    known = all_transports()
    if section.transport not in known:
        hint = did_you_mean(section.transport, known) or f"; there are {', '.join(known)}"
        where = places.of(("parallel", "transport"))
        raise RecipeError(f"{where}: unknown transport {section.transport!r}{hint}")
