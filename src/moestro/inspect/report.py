"""Writes report.html: one page, without network, that shows what a run learned and what its experts did."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moestro.inspect import page, pictures, story
from moestro.inspect.history import LayerHistory, histories, use_validation_load
from moestro.inspect.likes import layer_likes
from moestro.inspect.moved import MovedExperts, moved_experts
from moestro.inspect.page import write_whole
from moestro.inspect.runfolder import RunFolder, read_run, series


def write_report(run: Path) -> Path:
    """Writes `report.html` into a run folder, from the folder's own files, and returns its path.

    The page holds everything it needs (scripts, styles, data) and forbids itself every network access. Parts
    that the run does not have (no twin, no experts, not finished) are named in words.

    Args:
        run: folder that a training run wrote, finished or not.

    Raises:
        ValueError: the folder is not a run folder.
        ModuleNotFoundError: plotly is not installed.
    """
    run = Path(run)
    path = run / "report.html"
    write_whole({path: render(read_run(run))})
    return path


def render(run: RunFolder) -> str:
    """The page as text."""
    layers = histories(run.routing)
    model = "dense model" if story.is_dense(run) else "MoE"
    domains, likes = layer_likes(run.specialisation)
    most = max((share for layer in likes for row in layer.by_domain for share in row), default=0.0) or 1.0
    on_validation = use_validation_load(layers, {of.name: [e.share for e in of.experts] for of in likes})
    moved = moved_experts(layers, run.events)
    last_record = max((layer.steps[-1] for layer in layers), default=0)
    return page.render(
        "report.html.j2",
        name=run.path.resolve().name,
        about=_about(run, layers),
        verdict=story.verdict(run),
        tiles=story.tiles(run),
        notices=story.notices(run),
        dense=story.is_dense(run),
        has_twin=run.twin is not None,
        loss=_loss(run, model),
        validation=_validation(run, model),
        layers=[_load(layer) for layer in layers],
        dead_total=sum(len(layer.dead) for layer in layers),
        when="at the end" if on_validation else f"at step {last_record}",
        where="for the tokens of the validation text" if on_validation else f"at step {last_record}",
        entropy=_lines(layers, "entropy", "nats", _even(layers)),
        margin=_lines(layers, "margin", "probability"),
        dropped=_lines(layers, "dropped", "share"),
        drops_recorded=any("dropped" in layer.curves for layer in layers),
        moved=moved,
        moved_picture=_moved_picture(moved) if moved is not None else None,
        domains=domains,
        likes=[(layer, _domain_picture(layer.by_domain, domains, most)) for layer in likes],
        best=max((layer for layer in likes if layer.information is not None), default=None, key=_information),
        facts=story.facts(run),
        recipe_text=run.recipe_text,
    )


def _about(run: RunFolder, layers: Sequence[LayerHistory]) -> str:
    """The model in one line, as the recipe describes it."""
    if story.is_dense(run):
        return "a dense language model"
    method = story.find(run.recipe, "model.method")
    if not layers:
        return f"a language model with {method} routing" if method else "a training run"
    last = layers[-1]
    experts = "experts" if last.num_experts > 1 else "expert"
    kind = f"{method} routing" if method else "routing"
    how = f"{last.num_experts} {experts} in {'each of ' if len(layers) > 1 else ''}{len(layers)} "
    return f"{kind}, {how}layer{'s' if len(layers) > 1 else ''}, {last.experts_per_token:.3g} per token"


def _curves(run: RunFolder, model: str, records: str, key: str) -> dict[str, tuple[list[int], list[float]]]:
    """The model's curve under its name and the twin's, without empty ones."""
    curves = {model: series(getattr(run, records), key)}
    if run.twin is not None:
        curves["dense twin"] = series(getattr(run.twin, records), key)
    return {name: curve for name, curve in curves.items() if curve[0]}


def _loss(run: RunFolder, model: str) -> dict[str, Any] | None:
    curves = _curves(run, model, "metrics", "loss")
    return pictures.loss_curves(curves) if model in curves else None


def _validation(run: RunFolder, model: str) -> dict[str, Any] | None:
    for key, unit in (("bits_per_byte", "bits per byte"), ("validation_loss", "nats per token")):
        curves = _curves(run, model, "evaluations", key)
        if model in curves:
            return pictures.validation_curves(curves, unit)
    return None


def _load(layer: LayerHistory) -> dict[str, Any]:
    return {
        "label": layer.label,
        "name": layer.name,
        "dead": layer.dead,
        "threshold": layer.threshold,
        "over_time": pictures.load_over_time(layer.steps, layer.loads),
        "final": pictures.final_load(layer.final, layer.dead),
    }


def _moved_picture(moved: MovedExperts) -> dict[str, Any]:
    curves = {"as it was": (moved.steps, moved.placed), "had none moved": (moved.steps, moved.in_order)}
    return pictures.lines_per_layer(curves, "busiest process / mean")


def _lines(
    layers: Sequence[LayerHistory], key: str, unit: str, ceiling: tuple[float, str] | None = None
) -> dict[str, Any] | None:
    """One line per layer, None if no layer has the number or, for drops, if nothing was dropped."""
    curves = {layer.label: layer.curves[key] for layer in layers if key in layer.curves}
    if not curves or (key == "dropped" and not any(max(values) > 0 for _, values in curves.values())):
        return None
    return pictures.lines_per_layer(curves, unit, ceiling)


def _even(layers: Sequence[LayerHistory]) -> tuple[float, str] | None:
    """The entropy of a router without any preference, where all layers have equally many experts."""
    sizes = {layer.num_experts for layer in layers}
    size = sizes.pop() if len(sizes) == 1 else 1
    return (math.log(size), f"no preference: ln {size} = {math.log(size):.2f}") if size > 1 else None


def _domain_picture(by_domain: list[list[float]], domains: Sequence[str], most: float) -> dict[str, Any] | None:
    return pictures.domains_by_expert(by_domain, domains, most) if by_domain else None


def _information(layer: Any) -> float:
    return float(layer.information)
