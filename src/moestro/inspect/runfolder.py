"""Reads whatever a run folder holds; what is missing or damaged becomes a sentence, not a crash."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

_EVIDENCE = ("result.json", "metrics.jsonl", "evaluations.jsonl", "routing.jsonl", "recipe.yaml")


@dataclass(frozen=True)
class RunFolder:
    """The content of a run folder, every part empty where its file is absent.

    Attributes:
        path: the folder.
        recipe: resolved recipe; `recipe_text` is the file as written.
        metrics, evaluations, routing: records with an integer `step`, one per step, in order of the steps.
        events: records of what happened besides, several per step perhaps.
        result: content of result.json.
        specialisation: content of specialisation.json.
        twin: the dense twin's files, None where the run has none.
        problems: what could not be read, one sentence each.
    """

    path: Path
    recipe: Mapping[str, Any] = field(default_factory=dict)
    recipe_text: str = ""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    routing: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    result: Mapping[str, Any] = field(default_factory=dict)
    specialisation: Mapping[str, Any] = field(default_factory=dict)
    twin: RunFolder | None = None
    problems: tuple[str, ...] = ()


def read_run(path: Path) -> RunFolder:
    """Reads a run folder and its twin; ValueError if the folder holds no trace of a run."""
    if not any((path / name).is_file() for name in _EVIDENCE):
        raise ValueError(f"{path} is not a run folder; pass one that `moestro train --out` wrote")
    return _read(path, path / "twin")


def _read(path: Path, twin: Path | None) -> RunFolder:
    problems: list[str] = []
    recipe_text = _text(path / "recipe.yaml", problems)
    has_twin = twin is not None and any((twin / name).is_file() for name in _EVIDENCE)
    other = _read(twin, None) if twin is not None and has_twin else None
    return RunFolder(
        path=path,
        recipe=_yaml(path / "recipe.yaml", recipe_text, problems),
        recipe_text=recipe_text,
        metrics=_records(path / "metrics.jsonl", problems),
        evaluations=_records(path / "evaluations.jsonl", problems),
        routing=_records(path / "routing.jsonl", problems),
        events=_every_record(path / "events.jsonl", problems),
        result=_json(path / "result.json", problems),
        specialisation=_json(path / "specialisation.json", problems),
        twin=other,
        problems=(*problems, *(other.problems if other else ())),
    )


def number(value: Any) -> float | None:
    """The value as a finite float, None if it is anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer beyond every float
        return None


def series(records: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the records that have a finite number under the key."""
    pairs = [(record["step"], number(record.get(key))) for record in records]
    known = [(step, value) for step, value in pairs if value is not None]
    return [step for step, _ in known], [value for _, value in known]


def _name(path: Path) -> str:
    return f"twin/{path.name}" if path.parent.name == "twin" else path.name


def _text(path: Path, problems: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        problems.append(f"{_name(path)} could not be read: {error.strerror or error}.")
        return ""


def _json(path: Path, problems: list[str]) -> Mapping[str, Any]:
    text = _text(path, problems)
    try:
        value = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        problems.append(f"{_name(path)} is damaged: expected one JSON object.")
        return {}
    return value


def _yaml(path: Path, text: str, problems: list[str]) -> Mapping[str, Any]:
    try:
        value = yaml.safe_load(text) if text.strip() else {}
    except (yaml.YAMLError, RecursionError):
        value = None
    if not isinstance(value, dict):
        problems.append(f"{_name(path)} is damaged: expected a YAML mapping.")
        return {}
    return value


def _records(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """One record per step, the last one written."""
    by_step = {record["step"]: record for record in _every_record(path, problems)}
    return [by_step[step] for step in sorted(by_step)]


def _every_record(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The records as they were written; a torn last line is how an interruption looks."""
    lines = _text(path, problems).split("\n")
    records: list[dict[str, Any]] = []
    damaged = 0
    for last, record in _parsed(lines):
        step = record.get("step") if isinstance(record, dict) else None
        if isinstance(step, int) and not isinstance(step, bool):
            records.append(record)
        elif not last:
            damaged += 1
    if damaged:
        problems.append(f"{_name(path)}: {damaged} unreadable line(s) were left out.")
    return records


def _parsed(lines: list[str]) -> Iterator[tuple[bool, Any]]:
    for i, line in enumerate(lines):
        if line.strip():
            try:
                yield i == len(lines) - 1, json.loads(line)
            except (ValueError, RecursionError):
                yield i == len(lines) - 1, None
