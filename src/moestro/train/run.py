"""A whole run: a mixture of experts, then its dense twin on the same batches, then the report."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moestro.balance import RoutingLog
from moestro.inspect import write_report
from moestro.models import DecoderLM
from moestro.train.build import build_corpus, build_model, training_batches, validation_batches
from moestro.train.checkpoints import checkpoint_table
from moestro.train.files import read_lines, write_json
from moestro.train.folder import RECIPE, check_folder, claim_folder, has_run, remove_run
from moestro.train.interrupt import Interrupt
from moestro.train.lock import writing
from moestro.train.machine import choose_machine, repeatable
from moestro.train.progress import Progress, default_progress
from moestro.train.recipe import Recipe, load_recipe
from moestro.train.training import Surroundings, Training, checkpoints_of


def train_run(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool | Literal["auto"] = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train what a recipe describes and write everything about it to a folder.

    Everything that can be refused is refused before the folder is touched. The first ctrl-C (or SIGTERM) finishes
    the step, saves `checkpoint/` and raises Stopped; the second acts at once. With the same seed, threads, versions
    and processor two runs have the same losses bit for bit, also when one of them was stopped and resumed.

    Args:
        recipe: what to do.
        out: folder of the run.
        resume: continue the run in `out`, which must have the same recipe, from its newest checkpoint that is
            whole; a finished run is returned as it is. "auto" starts a run where `out` holds none.
        overwrite: replace the run in `out`.
        progress: is told what happens; None = a live display on a terminal, plain lines elsewhere.

    Returns: the content of result.json; the twin's under "twin". The report is `out/report.html`.

    Raises:
        ValueError: the recipe, the text or the folder cannot be used.
        NonFiniteLoss: the loss or gradient of a step is not finite.
        Stopped: a signal stopped the run and its state was saved.
    """
    out, progress = Path(out), progress or default_progress()
    result = train_models(recipe, out, resume=resume, overwrite=overwrite, progress=progress)
    _report(out, progress)
    return result


def train_models(
    recipe: Recipe, out: Path, *, resume: bool | Literal["auto"], overwrite: bool, progress: Progress
) -> dict[str, Any]:
    """What `train_run` does, without the report."""
    resume = has_run(out) if resume == "auto" else resume
    check_folder(out, recipe, resume=resume, overwrite=overwrite)
    machine = choose_machine(recipe.train.device, recipe.train.precision, recipe.train.threads)
    with repeatable(machine), _random_states_kept(), Interrupt() as interrupt:
        around = Surroundings(recipe, machine, build_corpus(recipe.data), progress, interrupt)
        model = _model(around)
        introduce(around, model)
        with _folder(out), writing(out) as dead, _nothing_half_begun(out, resume):
            if dead is not None:
                progress.say(f"process {dead}, which wrote this run before, died without giving it back")
            claim_folder(out, recipe, resume=resume)
            return _train(around, model, out)


def run_checkpoints(run: str | Path, *, verify: bool = False) -> list[dict[str, Any]]:
    """The checkpoints of a run's models, one row each; see `checkpoint_table`.

    Raises ValueError when the folder holds no run.
    """
    run = Path(run)
    if not has_run(run):
        raise ValueError(f"{run} holds no run; give the folder that `moestro train` wrote")
    settings = load_recipe(run / RECIPE).train
    models = {"moe": checkpoints_of(run, settings), "dense twin": checkpoints_of(run / "twin", settings)}
    return checkpoint_table(run, models, verify=verify)


def _report(out: Path, progress: Progress) -> None:
    """Write the page; a finished run stays finished where the page's optional library is missing."""
    try:
        write_report(out)
    except ModuleNotFoundError as error:
        progress.say(f"no report yet: {error}")


def introduce(around: Surroundings, model: DecoderLM) -> None:
    """The facts that decide a run, said before its first step."""
    counts, recipe = model.parameter_counts(), around.recipe
    lines = [around.machine.describe(), *(f"text: {line}" for line in around.corpus.describe())]
    lines.append(f"parameters: {_spaced(counts.total)} total, {_spaced(counts.active)} active")
    lines += [f"balance: {line}" for line in _balance(model)]
    tokens = recipe.train.batch_size * recipe.data.sequence_length
    lines.append(f"{recipe.train.steps} steps of {_spaced(tokens)} tokens, seed {recipe.seed}")
    for line in lines:
        around.progress.say(line)


def _model(around: Surroundings) -> DecoderLM:
    """The model with fresh weights; refuses text that is too short for it."""
    recipe, corpus = around.recipe, around.corpus
    training_batches(corpus, recipe)
    validation_batches(corpus.validation, recipe.train.batch_size, recipe.data.sequence_length)
    return build_model(
        recipe.model,
        vocab_size=corpus.tokenizer.vocab_size,
        sequence_length=recipe.data.sequence_length,
        seed=recipe.seed,
        num_domains=len(corpus.domains),
    )


def _balance(model: DecoderLM) -> list[str]:
    if model.config["method"] is None:
        return ["dense model, nothing to balance"]
    log = RoutingLog(model)
    log.close()
    return log.describe()


def _train(around: Surroundings, model: DecoderLM, out: Path) -> dict[str, Any]:
    """Train the model and then its twin, each unless its result is there already."""
    recipe = around.recipe
    result = _trained("moe" if recipe.model.method else "dense", model, out, around)
    if not recipe.twin or recipe.model.method is None:
        return result
    twin = model.dense_twin(recipe.seed)
    counts = twin.parameter_counts()
    around.progress.say(f"dense twin: {_spaced(counts.total)} parameters, the same batches in the same order")
    result["twin"] = _trained("dense twin", twin, out / "twin", around)
    write_json(out / "result.json", result)
    return result


def _trained(name: str, model: DecoderLM, folder: Path, around: Surroundings) -> dict[str, Any]:
    if (folder / "result.json").is_file():
        around.progress.say(f"{name}: finished before")
        result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        return result
    return Training(name, model, folder, around).run()


@contextmanager
def _folder(out: Path) -> Iterator[None]:
    """The folder, made if need be; what was made goes again when an error leaves it empty."""
    created = [path for path in (out, *out.parents) if not path.exists()]
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in created:
            with suppress(OSError):
                path.rmdir()
        raise


@contextmanager
def _nothing_half_begun(out: Path, resume: bool) -> Iterator[None]:
    """A new run that fails before its first step leaves no files behind."""
    try:
        yield
    except BaseException:
        if not resume and not read_lines(out / "metrics.jsonl") and not (out / "checkpoint").exists():
            remove_run(out)
        raise


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Give the caller's generators of Python and numpy back as they were."""
    python, legacy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)


def _spaced(number: int) -> str:
    return f"{number:,}".replace(",", " ")
