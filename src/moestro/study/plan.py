"""A study as a list of trainings, and where each of them lies in the folder of the study."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moestro.study.match import Match, dense_model, match
from moestro.study.recipe import DENSE, Entry, StudyRecipe, entries, file_name
from moestro.train.build import build_corpus, build_model
from moestro.train.recipe import Recipe


@dataclass(frozen=True)
class Row:
    """One method of the study.

    Attributes:
        label: how the table calls it.
        method: its name; None for the dense model.
        options: that it is trained with.
        match: its sizes; None if it cannot be built, and then `problem` says why.
    """

    label: str
    method: str | None
    options: dict[str, Any] = field(default_factory=dict)
    match: Match | None = None
    problem: str = ""


@dataclass(frozen=True)
class Job:
    """One training: a row and a seed.

    Attributes:
        row: what is trained.
        seed: of weights, data order and routing noise.
        recipe: what the worker reads.
        folder: of the run.
    """

    row: Row
    seed: int
    recipe: Recipe
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.row.label} seed {self.seed}"

    @property
    def log(self) -> Path:
        """What the worker printed."""
        return self.folder.with_suffix(".log")

    @property
    def failure(self) -> Path:
        """Where the sentence of a failure is kept."""
        return self.folder.with_suffix(".failed.json")

    @property
    def result(self) -> dict[str, Any] | None:
        """What the run found, once it is done."""
        return read_json(self.folder / "result.json")

    @property
    def problem(self) -> str:
        """Why it failed; empty unless it did."""
        return (read_json(self.failure) or {}).get("problem", "")

    @property
    def settled(self) -> bool:
        """Whether nothing is left to do."""
        return self.result is not None or bool(self.problem)


def plan_rows(study: StudyRecipe) -> list[Row]:
    """The dense model, then every method at its matched size."""
    corpus = build_corpus(study.data)
    vocab_size, num_domains = corpus.tokenizer.vocab_size, len(corpus.domains)
    return [_dense(study, vocab_size), *(_row(study, of, vocab_size, num_domains) for of in entries(study))]


def plan_jobs(study: StudyRecipe, rows: Sequence[Row], out: Path) -> list[Job]:
    """Every training, seed by seed, so that a study that is cut short has every method with the seeds it has."""
    return [
        Job(row, seed, _recipe(study, row.match, seed), out / "runs" / file_name(row.label) / f"seed{seed}")
        for seed in study.seeds
        for row in rows
        if row.match is not None
    ]


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file, None if it does not exist."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return found


def _dense(study: StudyRecipe, vocab_size: int) -> Row:
    section = dense_model(study)
    model = build_model(section, vocab_size=vocab_size, sequence_length=study.data.sequence_length, seed=0)
    counts = model.parameter_counts()
    return Row(DENSE, None, {}, Match(section, counts.active, counts.total))


def _row(study: StudyRecipe, entry: Entry, vocab_size: int, num_domains: int) -> Row:
    label = entry.label or entry.method
    try:
        found = match(study, entry, vocab_size, num_domains)
    except ValueError as error:
        return Row(label, entry.method, entry.options, None, str(error))
    return Row(label, entry.method, found.model.options, found)


def _recipe(study: StudyRecipe, found: Match, seed: int) -> Recipe:
    return Recipe(seed=seed, twin=False, model=found.model, data=study.data, train=study.train)
