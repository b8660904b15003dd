"""The options that name values of a recipe, derived from its schema so that they stay in step with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypedDict, get_origin

from cyclopts import CoercionError, Group, Parameter, Token
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from moestro.train.recipe import Recipe

#: Options so common that they have a short name too.
SHORTCUTS = {
    "model.method": "--method",
    "train.steps": "--steps",
    "parallel.mesh": "--mesh",
    "parallel.transport": "--transport",
}


def whole_number(kind: Any, tokens: Sequence[Token]) -> int:
    """The converter of whole numbers: refuses `3.5`, which cyclopts would round."""
    try:
        return int(tokens[0].value)
    except ValueError:
        raise CoercionError(token=tokens[0], target_type=int) from None


def whole_number_or_none(kind: Any, tokens: Sequence[Token]) -> int | None:
    """`whole_number` for an option that may be left open: also takes `none`."""
    return None if tokens[0].value.lower() in ("none", "null") else whole_number(kind, tokens)


def overrides(flags: dict[str, Any] | None) -> dict[str, Any]:
    """What the options say, nested like a recipe: `{"model": {"width": 64, "options": {"top_k": 1}}}`.

    Args:
        flags: the value that the command line gives for `RecipeFlags`.
    """
    nested = dict(flags or {})
    model = dict(nested.get("model", {}))
    if "options" in model:
        model["options"] = parse_options(model["options"])
    if str(model.get("method", "")).lower() in ("none", "null", "dense"):
        model["method"] = None
    return {**nested, "model": model} if model else nested


def parse_options(words: dict[str, str]) -> dict[str, Any]:
    """Options of a method as numbers, truth values or text: `{"top-k": "1"}` -> `{"top_k": 1}`."""
    return {name.replace("-", "_"): parse_value(word) for name, word in words.items()}


def parse_value(word: str) -> Any:
    """A word as YAML would read it, with `1e-3` as the number that it looks like."""
    constants = {"true": True, "false": False, "null": None, "none": None}
    if word.lower() in constants:
        return constants[word.lower()]
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


def _section(section: type[BaseModel], prefix: str = "") -> Any:
    """A TypedDict with one optional key per field; cyclopts makes options of it and answers with those given."""
    keys: dict[str, Any] = {}
    for order, (name, field) in enumerate(section.model_fields.items()):
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            group = Group(f"{name.capitalize()} section of the recipe", sort_key=order + 1)
            keys[name] = Annotated[_section(kind, f"{prefix}{name}."), Parameter(group=group)]
        else:
            words = dict[str, str] if kind == dict[str, Any] else kind  # `parse_options` reads them
            keys[name] = Annotated[words, _option(prefix + name, field)]
    return TypedDict(f"{section.__name__}Flags", keys, total=False)  # type: ignore[operator]


def _option(path: str, field: FieldInfo) -> Parameter:
    names = [f"--{path.replace('_', '-')}", *([SHORTCUTS[path]] if path in SHORTCUTS else [])]
    converters: dict[Any, Any] = {int: whole_number, int | None: whole_number_or_none}
    return Parameter(
        name=names,
        help=_help(field),
        converter=converters.get(field.annotation),
        consume_multiple=get_origin(field.annotation) is tuple,
        negative_iterable=(),
    )


def _help(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=False)
    if default in (None, PydanticUndefined, ()):
        return f"{field.description}"
    shown = {True: "yes", False: "no"}[default] if isinstance(default, bool) else default
    return f"{field.description} [default: {shown}]"


if TYPE_CHECKING:
    RecipeFlags = dict[str, Any] | None
else:
    RecipeFlags = Annotated[_section(Recipe) | None, Parameter(name="*")]
Whole = Annotated[int, Parameter(converter=whole_number)]
WholeOrNone = Annotated[int | None, Parameter(converter=whole_number_or_none)]
