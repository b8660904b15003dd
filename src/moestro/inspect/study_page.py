"""Writes study.html: one page, without network, that compares the methods of a study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moestro.inspect import study_pictures
from moestro.inspect.page import Tile, render, tiles_of, write_whole
from moestro.inspect.study_words import alike, difference, interval, noise, remarks


def write_study_page(study: Path) -> Path:
    """Write `study.html` beside a study.json and return its path.

    The page holds everything it needs and forbids itself every network access.

    Raises:
        ModuleNotFoundError: plotly is not installed.
    """
    page = render_study(json.loads(study.read_text(encoding="utf-8")))
    path = study.with_name("study.html")
    write_whole({path: page})
    return path


def render_study(study: dict[str, Any]) -> str:
    """The page as text."""
    ranked = [row for row in study["rows"] if row["rank"]]
    return render(
        "study.html.j2",
        interval=interval,
        difference=difference,
        alike=alike,
        remarks=remarks,
        study=study,
        verdict=verdict(study),
        noise=noise(study),
        tiles=_tiles(study, ranked),
        curves=study_pictures.curves(ranked) if ranked else None,
        forest=study_pictures.differences(ranked) if any(row["difference"] for row in ranked) else None,
        trade=study_pictures.trade(ranked) if any(row["speed"] for row in ranked) else None,
    )


def verdict(study: dict[str, Any]) -> str:
    """The result in a sentence or two."""
    ranked = [row for row in study["rows"] if row["rank"]]
    compared = [row for row in ranked if row["difference"]]
    if not compared:
        return "Nothing can be compared yet."
    best = compared[0]
    alike = [row["label"] for row in compared if row["rank"] in best["within_noise"]]
    better = sum(row["difference"]["within_noise"] is False and row["difference"]["mean"] < 0 for row in compared)
    worse = sum(row["difference"]["within_noise"] is False and row["difference"]["mean"] > 0 for row in compared)
    undecided = len(compared) - better - worse
    return (
        f"{best['label']} reached {interval(best['bits_per_byte'])} bits per byte; {len(alike)} other methods are "
        f"within noise of it. Against the dense model of equal active parameters, {better} methods are better, "
        f"{worse} worse and {undecided} within noise."
    )


def _tiles(study: dict[str, Any], ranked: list[dict[str, Any]]) -> list[dict[str, str]]:
    dense = next((row for row in ranked if row["method"] is None), None)
    failed = sum(1 for row in study["rows"] for run in row["runs"] if run["problem"])
    of = f"of {study['trainings']}"
    tiles: list[Tile] = [
        ("trainings", f"{study['settled']}", of, "finished or failed", ""),
        ("failed", f"{failed}", "trainings", "the table says why", "bad" if failed else "good"),
        ("seeds", f"{len(study['seeds'])}", "per method", "paired by seed", ""),
        ("tokens", f"{study['tokens']:,}".replace(",", " "), "per training", "the same for all", ""),
    ]
    if dense is not None:
        size = f"{dense['active_parameters']:,}".replace(",", " ")
        tiles.append(("active parameters", size, "of the dense model", "every method within 1 % unless noted", ""))
    return tiles_of(tiles)
