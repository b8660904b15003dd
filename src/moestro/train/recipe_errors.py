"""One clear sentence for each thing that can be wrong in a recipe; imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "string": "a text",
    "bool": "true or false",
    "tuple": "a list",
    "dict": "a mapping",
    "model": "a mapping",
}


def did_you_mean(word: object, candidates: Iterable[str]) -> str:
    """`; did you mean x?`, or nothing when no candidate is close."""
    close = get_close_matches(str(word), list(candidates), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def dotted_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key of a schema, such as `train.steps`."""
    keys: list[str] = []
    for name, info in model.model_fields.items():
        nested = info.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            keys += dotted_keys(nested, f"{prefix}{name}.")
        keys.append(prefix + name)
    return keys


def _unknown(key: str, schema: type[BaseModel]) -> str:
    section, _, name = key.rpartition(".")
    keys = dotted_keys(schema)
    siblings = [k.rpartition(".")[2] for k in keys if k.rpartition(".")[0] == section]
    hint = did_you_mean(name, siblings)
    if not hint:  # perhaps the right key in the wrong section
        by_name = {k.rpartition(".")[2]: k for k in keys}
        close = get_close_matches(name, by_name, n=1, cutoff=0.8)
        hint = f"; did you mean {by_name[close[0]]}?" if close else f"; {_listing(section, siblings)}"
    return f"unknown key {key}{hint}"


def _listing(section: str, siblings: Sequence[str]) -> str:
    return f"{section or 'a recipe'} takes {', '.join(siblings)}" if siblings else f"{section} takes no keys"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def sentence(error: ErrorDetails, schema: type[BaseModel]) -> str:
    """What is wrong with one key, what was expected, and what was given."""
    key = ".".join(str(part) for part in error["loc"] if part != "[key]")
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown(key, schema)
    if kind == "value_error":
        return f"{key}: {context['error']}"
    if kind == "literal_error":
        allowed = context["expected"].replace("'", "")
        hint = did_you_mean(value, allowed.replace(" or ", ", ").split(", "))
        return f"{key}: expected {allowed}, not {_shown(value)}{hint}"
    if kind == "int_from_float":
        return f"{key}: expected a whole number, not {_shown(value)}"
    if kind.endswith(("_type", "_parsing")) and kind.split("_")[0] in _EXPECTED:
        return f"{key}: expected {_EXPECTED[kind.split('_')[0]]}, not {_shown(value)}"
    expected = error["msg"].removeprefix("Input should be ").removeprefix("Input should ")
    return f"{key}: expected a value {expected}, not {_shown(value)}"


def first_error(error: ValidationError) -> ErrorDetails:
    """Unknown keys come first: they often explain the rest."""
    return min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")


def differing_keys(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys whose values differ between two resolved recipes, with both values."""
    found: list[str] = []
    for key in dict.fromkeys((*ours, *theirs)):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differing_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} ({_shown(b)} there, {_shown(a)} now)")
    return found
