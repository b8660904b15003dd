"""What a recipe may say only together with something else, or only if it exists; torch is imported where needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moestro.train.recipe_errors import did_you_mean
from moestro.train.sections import ModelSection, ParallelSection, TrainSection
from moestro.train.yaml_source import RecipeError, YamlSource


@dataclass(frozen=True)
class Places:
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


def check_method(model: ModelSection, places: Places) -> None:
    """Raise RecipeError unless the method and its options exist."""
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


def check_sharing(section: ParallelSection, train: TrainSection, places: Places) -> None:
    """Raise RecipeError for a dense part that is shared out and compiled."""
    if section.shard_dense and train.compile:
        key = places.of(("parallel", "shard_dense"))
        raise RecipeError(
            f"{key}: train.compile does not know a dense part that is shared out; leave one of them out"
        )


def check_transport(section: ParallelSection, places: Places) -> None:
    """Raise RecipeError unless the transport exists; torch is needed for any but the default."""
    if section.transport == ParallelSection.model_fields["transport"].default:
        return
    from moestro.parallel import all_transports

    known = all_transports()
    if section.transport not in known:
        hint = did_you_mean(section.transport, known) or f"; there are {', '.join(known)}"
        where = places.of(("parallel", "transport"))
        raise RecipeError(f"{where}: unknown transport {section.transport!r}{hint}")
