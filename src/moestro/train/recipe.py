"""What a training run needs, as one frozen value read from a YAML recipe; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from moestro.train.placement_words import check_placement, without_idle_placement
from moestro.train.recipe_checks import Places, check_method, check_sharing, check_transport
from moestro.train.recipe_errors import did_you_mean, first_error, sentence
from moestro.train.sections import (
    DataSection,
    ModelSection,
    ParallelSection,
    PlacementSection,
    Section,
    TrainSection,
)
from moestro.train.yaml_source import RecipeError, read_yaml

__all__ = [
    "DataSection",
    "ModelSection",
    "ParallelSection",
    "PlacementSection",
    "Recipe",
    "RecipeError",
    "Section",
    "TrainSection",
]
__all__ += ["dump_recipe", "find_recipe", "load_recipe", "shipped_recipes"]


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
    places = Places(source, given)
    recipe = _validated(_merged(below, given), places)
    check_method(recipe.model, places)
    check_transport(recipe.parallel, places)
    check_sharing(recipe.parallel, recipe.train, places)
    check_placement(recipe.parallel.placement, lambda key: places.of(("parallel", "placement", key)))
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


def _validated(values: Mapping[str, Any], places: Places) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        first = first_error(error)
        raise RecipeError(f"{places.of(first['loc'])}: {sentence(first, Recipe)}") from None
