"""Writes the page of a model that was run over a text: what its routers and experts do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moestro.inspect import model_pictures, pictures
from moestro.inspect.likes import layer_likes
from moestro.inspect.page import Tile, folder_name, in_words, render, tiles_of, write_with_numbers

_SHOWN = 8
"""Layers that are shown at once; the rest is folded away."""


def write_model_page(found: Mapping[str, Any], page: Path) -> tuple[Path, Path]:
    """Write the page and, beside it, its numbers as JSON; both or, where one fails, neither.

    The page holds everything it needs and forbids itself every network access.

    Args:
        found: what `Survey.result` says, with `model` and `text` beside it.
        page: an .html path.

    Returns: the page and the JSON file.

    Raises:
        ModuleNotFoundError: plotly is not installed.
    """
    return write_with_numbers(render_model_page(found), found, page)


def render_model_page(found: Mapping[str, Any]) -> str:
    """The page as text."""
    layers = found["layers"]
    domains, likes = layer_likes(
        {
            "domains": found["domains"],
            "layers": [{"name": layer["name"], **layer["specialisation"]} for layer in layers],
        }
    )
    most = max((share for layer in likes for row in layer.by_domain for share in row), default=0.0) or 1.0
    return render(
        "model.html.j2",
        name=folder_name(Path(found["model"]["folder"])),
        model=found["model"],
        text=found["text"],
        findings=found["findings"],
        layers=layers,
        labels={layer["name"]: layer["label"] for layer in layers},
        shown=_SHOWN,
        tiles=_tiles(found),
        every_layer=model_pictures.every_layer(layers),
        coverage=model_pictures.coverage_curves(layers),
        loads=[(layer, model_pictures.load_and_mass(layer)) for layer in layers],
        pairs=[(layer, _lift(layer["coactivation"])) for layer in layers if layer["coactivation"]],
        outputs=_alike(layers, "outputs"),
        weights=_alike(layers, "weights"),
        domains=domains,
        likes=[
            (layer, pictures.domains_by_expert(layer.by_domain, domains, most) if layer.by_domain else None)
            for layer in likes
        ],
    )


def _lift(pairs: Mapping[str, Any]) -> dict[str, Any]:
    labels = {0.0: "0", 0.5: "½×", 1.0: "blind", 1.5: "1½×", 2.0: "≥ 2×"}
    return model_pictures.pair_map(pairs["experts"], pairs["lift"], most=2.0, middle=1.0, labels=labels)


def _alike(layers: list[dict[str, Any]], kind: str) -> list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """Layer, similarity and picture; all pictures of a kind share one scale, so that layers compare."""
    known = [(layer, layer[f"similarity_of_{kind}"]) for layer in layers if layer[f"similarity_of_{kind}"]]
    largest = max(
        (
            abs(value)
            for _, alike in known
            for a, row in enumerate(alike["matrix"])
            for b, value in enumerate(row)
            if a != b
        ),
        default=0.0,
    )
    scale = max(largest, 0.01)
    return [
        (layer, alike, model_pictures.pair_map(alike["experts"], alike["matrix"], most=scale, middle=0.0))
        for layer, alike in known
    ]


def _tiles(found: Mapping[str, Any]) -> list[dict[str, str]]:
    layers = found["layers"]
    experts = sum(layer["num_experts"] for layer in layers)
    never, dead = (sum(len(layer[key]) for layer in layers) for key in ("never", "dead"))
    busiest = max(max(layer["load"]) * layer["num_experts"] for layer in layers)
    known = [layer["next_layer"]["recall"] for layer in layers if layer["next_layer"]]
    ties = [layer["tie_rate"] for layer in layers if layer["tie_rate"] is not None]
    tiles: list[Tile] = [
        (
            "tokens",
            in_words(found["text"]["tokens"]),
            "of text",
            f"{len(found['domains'])} domains",
            "",
        ),
        ("never routed", f"{never}", f"of {experts} experts", "no token of this text", "bad" if never else "good"),
        ("dead", f"{dead}", f"of {experts} experts", "hardly any token", "bad" if dead else "good"),
        ("busiest expert", f"{busiest:.1f}×", "the fair share", "of all layers", ""),
    ]
    if known:
        mean = 100 * sum(known) / len(known)
        tiles.append(("next layer", f"{mean:.0f} %", "of choices foreseen", "from the layer before", ""))
    if ties:
        worst = 100 * max(ties)
        tiles.append(
            ("ties", f"{worst:.2g} %", "of tokens at most", "equal experts compete", "bad" if worst else "good")
        )
    return tiles_of(tiles)
