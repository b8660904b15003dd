"""What a study compares, as one frozen value read from a YAML recipe; imports no torch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from moestro.train.recipe import DataSection, ModelSection, RecipeError, Section, TrainSection, find_recipe
from moestro.train.recipe_errors import did_you_mean, first_error, sentence
from moestro.train.yaml_source import YamlSource, read_yaml

DENSE = "dense"
"""Label of the dense model that every method is compared with."""


class Settings(Section):
    """What a method needs besides its name."""

    options: dict[str, Any] = Field(default_factory=dict, description="options of the method")
    grid: dict[str, list[Any]] = Field(default_factory=dict, description="options that take each of these values")
    num_experts: int | None = Field(None, ge=1, description="experts, where the method needs another number")
    expert_hidden: int | None = Field(None, ge=1, description="hidden size; default: equal active parameters")


class Entry(Settings):
    """One method, or one for every combination of its grid."""

    method: str
    label: str | None = Field(None, description="how the table calls it; default: the method and its grid values")


class StudyRecipe(Section):
    """A whole study: `moestro study RECIPE.yaml` reads it, the folder of the study keeps it.

    `model`, `data` and `train` are those of a training recipe and hold for every method; `model.dense_hidden` sets
    the active parameters that all of them get.
    """

    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="every method is trained with each")
    methods: Literal["causal"] | tuple[Entry, ...] = Field(description="causal = all of them, or a list")
    without: tuple[str, ...] = Field((), description="methods that `causal` leaves out")
    settings: dict[str, Settings] = Field(default_factory=dict, description="by method, for `causal`")
    top_k: int = Field(2, ge=1, description="experts per token, for methods whose own default is larger")
    model: ModelSection = Field(default_factory=lambda: ModelSection.model_validate({}))
    data: DataSection = Field(default_factory=lambda: DataSection.model_validate({}))
    train: TrainSection = Field(default_factory=lambda: TrainSection.model_validate({}))

    @field_validator("methods", mode="before")
    @classmethod
    def _names_are_entries(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        return tuple({"method": entry} if isinstance(entry, str) else entry for entry in value)

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value) or min(value) < 0:
            raise ValueError("seeds are different whole numbers from 0 on")
        return value

    @model_validator(mode="after")
    def _the_study_names_the_methods(self) -> StudyRecipe:
        given = self.model.model_fields_set & {"method", "options"}
        if given:
            raise ValueError(f"model.{min(given)} belongs to one method; a study names them under methods")
        if self.methods != "causal" and (self.without or self.settings):
            raise ValueError("without and settings are for methods: causal; write the list as it should be")
        return self

    @property
    def dense_hidden(self) -> int:
        """Hidden size of the dense model's feed-forward layers."""
        return self.model.dense_hidden or self.top_k * self.model.expert_hidden


def load_study(path: str | Path) -> StudyRecipe:
    """A study from a YAML file or the name of a shipped one.

    Raises RecipeError, one sentence that names the file and the line, for an unknown key, a wrong type, a value out
    of range, an unknown method or an option that a method does not take.
    """
    source = read_yaml(find_recipe(path))
    try:
        study = StudyRecipe.model_validate(source.values)
    except ValidationError as error:
        first = first_error(error)
        raise RecipeError(f"{source.place(first['loc'])}: {sentence(first, StudyRecipe)}") from None
    _check(study, source)
    return study


def dump_study(study: StudyRecipe) -> str:
    """The study as YAML with every value written out; `load_study` reads it back unchanged."""
    values = study.model_dump(mode="json")
    for name in ("method", "options"):
        del values["model"][name]
    return yaml.safe_dump(values, sort_keys=False)


def entries(study: StudyRecipe) -> list[Entry]:
    """One entry per row of the study, grids multiplied out, each with its own label."""
    found = [single for entry in _entries(study) for single in _multiplied(entry)]
    labels = [entry.label for entry in found]
    twice = next((label for label in labels if labels.count(label) > 1 or label == DENSE), None)
    if twice is not None:
        raise RecipeError(f"two rows of the study are called {twice!r}; give one of them another label")
    return found


def _entries(study: StudyRecipe) -> list[Entry]:
    if study.methods != "causal":
        return list(study.methods)
    from moestro.methods import all_methods

    names = [name for name, method in all_methods().items() if method.causal and name not in study.without]
    return [
        Entry(method=name, **(study.settings[name].model_dump() if name in study.settings else {}))
        for name in names
    ]


def _multiplied(entry: Entry) -> Iterator[Entry]:
    for values in itertools.product(*entry.grid.values()):
        chosen = dict(zip(entry.grid, values, strict=True))
        words = [entry.label or entry.method, *(f"{name}={value}" for name, value in chosen.items())]
        label = " ".join(words)
        yield entry.model_copy(update={"label": label, "grid": {}, "options": {**entry.options, **chosen}})


def file_name(label: str) -> str:
    """The label as the name of a folder."""
    return re.sub(r"[^\w.=-]+", "_", label)


def _check(study: StudyRecipe, source: YamlSource) -> None:
    """Every method and option exists; only here is torch needed."""
    from moestro.methods import all_methods

    methods = all_methods()
    named: list[tuple[tuple[str | int, ...], str, Mapping[str, Any]]] = [
        (("without", i), name, {}) for i, name in enumerate(study.without)
    ]
    named += [(("settings", name), name, _values(of)) for name, of in study.settings.items()]
    if study.methods != "causal":
        named += [(("methods", i), of.method, _values(of)) for i, of in enumerate(study.methods)]
    for key, name, options in named:
        if name not in methods:
            hint = did_you_mean(name, methods) or "; `moestro methods` lists them"
            raise RecipeError(f"{source.place(key)}: unknown method {name!r}{hint}")
        _check_options(source.place(key), name, options, methods[name].options)
    entries(study)


def _values(settings: Settings) -> dict[str, Any]:
    """Every value of every option, also those of the grid, as a list each."""
    single = {name: [value] for name, value in settings.options.items()}
    return single | settings.grid


def _check_options(place: str, method: str, options: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for name, values in options.items():
        if name not in known:
            hint = did_you_mean(name, known) or f"; it takes {', '.join(known) or 'none'}"
            raise RecipeError(f"{place}: {method} has no option {name!r}{hint}")
        for value in values:
            try:
                known[name].parse(value)
            except ValueError as error:
                raise RecipeError(f"{place}: {method} {error}") from None
