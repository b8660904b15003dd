"""Reading a YAML recipe as plain values that remember the line they came from; imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1 << 20  # a recipe is a page of text; a megabyte is a mistake or an attack

Key = tuple[str | int, ...]


class RecipeError(ValueError):
    """What a user wrote in a recipe, or gave to override it, cannot be used; the message says where and why."""


@dataclass(frozen=True)
class YamlSource:
    """The values of a YAML file and the line of every key in it."""

    name: str
    values: dict[str, Any]
    lines: dict[Key, int] = field(default_factory=dict)

    def place(self, key: Key) -> str:
        """`file:line` of a key, or of the nearest enclosing key that has a line."""
        while key and key not in self.lines:
            key = key[:-1]
        return f"{self.name}:{self.lines[key]}" if key else self.name


class _Loader(yaml.SafeLoader):
    """Plain scalars, lists and mappings: no aliases (they can grow without bound), no repeated keys."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"an alias (*{event.anchor}) is not allowed; write the value out", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key in seen:
                message = f"the key {key!r} is given twice (first in line {seen[key]}); keep one of them"
                raise yaml.constructor.ConstructorError(None, None, message, key_node.start_mark)
            seen[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep)


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """PyYAML's rules without dates, and with `1e-3` read as the number that it is."""
    rules = {
        first: [(tag, pattern) for tag, pattern in rules if not tag.endswith(("timestamp", "merge"))]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    scientific = re.compile(r"[-+]?(\d[\d_]*)?\.?\d+[eE][-+]?\d+$")
    for first in "+-.0123456789":
        rules.setdefault(first, []).insert(0, ("tag:yaml.org,2002:float", scientific))
    return rules


_Loader.yaml_implicit_resolvers = _resolvers()


def _lines(node: yaml.Node, path: Key, lines: dict[Key, int]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            lines[(*path, key.value)] = key.start_mark.line + 1
            _lines(value, (*path, key.value), lines)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            lines[(*path, i)] = value.start_mark.line + 1
            _lines(value, (*path, i), lines)


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except IsADirectoryError:
        raise RecipeError(f"{path} is a folder, not a recipe; name a YAML file in it") from None
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise RecipeError(f"{path} has {len(data)} bytes; a recipe has at most {MAX_BYTES}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text: byte {error.start} cannot be decoded") from None


def read_yaml(path: Path) -> YamlSource:
    """The mapping in a YAML file, with the line of every key.

    Raises RecipeError with `file:line` for what is not a mapping of plain values.
    """
    text = _text(path)
    lines: dict[Key, int] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        values = {} if node is None else loader.construct_document(node)
        if node is not None:
            _lines(node, (), lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise RecipeError(f"{where}: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise RecipeError(f"{path}: nested too deeply for a recipe") from None
    except ValueError as error:  # for example an integer of thousands of digits
        raise RecipeError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping such as `seed: 0`, not a {type(values).__name__}")
    return YamlSource(str(path), values, lines)
