"""The words of a recipe for how its processes are arranged; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

AXES = ("data", "expert", "tensor")


def mesh_words(value: Any) -> str:
    """A mesh of a recipe in one spelling: `auto`, or `data=2,expert=2` with the axes in order.

    Args:
        value: such words, or a mapping of axes to sizes.

    Raises:
        ValueError: an unknown axis, an axis given twice, or a size below 1.
    """
    if isinstance(value, str) and value.strip() == "auto":
        return "auto"
    pairs = (
        list(value.items()) if isinstance(value, Mapping) else [part.partition("=")[::2] for part in _parts(value)]
    )
    found: dict[str, int] = {}
    for axis, size in ((str(name).strip(), str(size).strip()) for name, size in pairs):
        if axis not in AXES:
            raise ValueError(f"{axis!r} is no axis of a mesh; pass auto, or for example data=2,expert=2")
        if axis in found:
            raise ValueError(f"{axis} is given twice")
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(f"{axis}={size}: expected a whole number from 1 on")
        found[axis] = int(size)
    return ",".join(f"{axis}={found[axis]}" for axis in AXES if axis in found) or "auto"


def _parts(value: Any) -> list[str]:
    if not isinstance(value, str):
        raise ValueError(f"expected auto or for example data=2,expert=2, not {value!r}")
    return [part for part in value.split(",") if part.strip()]
