"""Writes the page of a comparison of two models or two traces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moestro.inspect import difference_pictures
from moestro.inspect.page import Tile, folder_name, in_words, render, tiles_of, write_with_numbers

MOST_TENSORS = 200
"""Tensors that a list of the page names."""


def write_difference_page(found: Mapping[str, Any], page: Path) -> tuple[Path, Path]:
    """Write the page and, beside it, its numbers as JSON; both or, where one fails, neither.

    Args:
        found: what `moestro.inspect.difference.difference` says, with `kind`, `a`, `b`, `text` and `tensors`.
        page: an .html path.

    Returns: the page and the JSON file.

    Raises:
        ModuleNotFoundError: plotly is not installed.
    """
    return write_with_numbers(render_difference_page(found), found, page)


def render_difference_page(found: Mapping[str, Any]) -> str:
    """The page as text."""
    layers = found["layers"]
    return render(
        "difference.html.j2",
        a=folder_name(Path(found["a"])),
        b=folder_name(Path(found["b"])),
        kind=found["kind"],
        text=found["text"],
        tensors=found["tensors"],
        most=MOST_TENSORS,
        findings=found["findings"],
        verdict=verdict(found),
        layers=layers,
        matrices=list(next(iter(_with(layers, "experts")), {"experts": {"by_matrix": {}}})["experts"]["by_matrix"]),
        tiles=_tiles(found),
        agreement=difference_pictures.agreement(_with(layers, "agreement")),
        load=difference_pictures.load_change(_with(layers, "load_a")),
        experts=difference_pictures.distances(_with(layers, "experts"), "experts", "distance"),
        routers=difference_pictures.distances(_with(layers, "router"), "router", "rows"),
    )


def verdict(found: Mapping[str, Any]) -> str:
    """The comparison in one sentence."""
    layers, tensors = found["layers"], found["tensors"]
    moved = [value for layer in _with(layers, "experts") for value in layer["experts"]["distance"]]
    chosen = [layer["agreement"] for layer in _with(layers, "agreement")]
    same_routing = all(layer["same_set"] == 1 for layer in _with(layers, "agreement"))
    weights = None
    if tensors is not None:
        others = (tensors["changed"], tensors["only_in_a"], tensors["only_in_b"], tensors["other_shape"])
        if not any(others) and all(value == 0 for value in moved):
            weights = "Every tensor is the same in both"
        else:
            known = [value for value in moved if value is not None]
            mean = f" by {100 * sum(known) / len(known):.2g} % of their length on average" if known else ""
            count = sum(value != 0 for value in moved)
            weights = f"{count} of {len(moved)} experts changed{mean}"
    routing = None
    if chosen:
        mean = 100 * sum(chosen) / len(chosen)
        routing = "every token chose the same experts" if same_routing else f"choices agree in {mean:.1f} %"
    sentence = "; ".join(part for part in (weights, routing) if part) or "nothing could be compared"
    return f"{sentence[0].upper()}{sentence[1:]}."


def _with(layers: Sequence[Mapping[str, Any]], key: str) -> list[Mapping[str, Any]]:
    return [layer for layer in layers if layer[key] is not None]


def _tiles(found: Mapping[str, Any]) -> list[dict[str, str]]:
    layers, tensors = found["layers"], found["tensors"]
    tiles: list[Tile] = []
    routed = _with(layers, "load_shift")
    if routed:
        tiles.append(("tokens", in_words(found["text"]["tokens"]), "compared", "in both", ""))
        chosen = [(layer["agreement"], layer["blind"]) for layer in _with(layers, "agreement")]
        if chosen:
            mean, blind = (100 * sum(column) / len(column) for column in zip(*chosen, strict=True))
            tiles.append(("choices that agree", f"{mean:.1f} %", "of all layers", f"blind: {blind:.1f} %", ""))
        shift = 100 * sum(layer["load_shift"] for layer in routed) / len(routed)
        tiles.append(("load that moved", f"{shift:.1f} %", "of the choices", "to another expert, net", ""))
        died, revived = (sum(len(layer[key]) for layer in routed) for key in ("died", "revived"))
        tiles.append(("died", f"{died}", "experts", f"{revived} came to life", "bad" if died else "good"))
    known = [
        value for layer in _with(layers, "experts") for value in layer["experts"]["distance"] if value is not None
    ]
    if known:
        mean = 100 * sum(known) / len(known)
        tiles.append(("experts moved", f"{mean:.2g} %", "of their length", f"at most {100 * max(known):.2g} %", ""))
    if tensors is not None:
        alone = len(tensors["only_in_a"]) + len(tensors["only_in_b"])
        tone = "bad" if alone + len(tensors["other_shape"]) else "good"
        note = f"{len(tensors['other_shape'])} of other shape"
        tiles.append(("tensors", f"{alone}", "in one alone", note, tone))
    return tiles_of(tiles)
