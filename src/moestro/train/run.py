"""A whole run: a mixture of experts, then its dense twin on the same batches, then the report."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moestro.balance import RoutingLog
from moestro.inspect import write_report
from moestro.kernels.allocator import MAPPED, keep_freed_memory
from moestro.models import DecoderLM
from moestro.train.alike import check_alike, check_same_text
from moestro.train.build import build_corpus, build_mesh, build_model, training_batches, validation_batches
from moestro.train.checkpoints import checkpoint_table
from moestro.train.company import company
from moestro.train.files import read_lines, write_json
from moestro.train.folder import RECIPE, TOKENIZER, check_folder, claim_folder, has_run, remove_run
from moestro.train.interrupt import Interrupt
from moestro.train.learner import checkpoints_of
from moestro.train.lock import writing
from moestro.train.machine import Machine, choose_machine, repeatable
from moestro.train.placing import check_placing
from moestro.train.progress import Progress, default_progress
from moestro.train.recipe import Recipe, load_recipe
from moestro.train.surroundings import Surroundings
from moestro.train.team import ALONE, Team
from moestro.train.training import Training


def train_run(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool | Literal["auto"] = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    team: Team = ALONE,
) -> dict[str, Any] | None:
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
        team: the processes that train together, all of which call this alike; the first writes and tells. See
            `moestro.train.launch_run`, which starts them on one computer.

    Returns: the content of result.json; the twin's under "twin". The report is `out/report.html`. In other
        processes of a team than the first None.

    Raises:
        ValueError: the recipe, the text or the folder cannot be used.
        NonFiniteLoss: the loss or gradient of a step is not finite.
        Stopped: a signal stopped the run and its state was saved.
    """
    out, progress = Path(out), progress or default_progress()
    result = train_models(recipe, out, resume=resume, overwrite=overwrite, progress=progress, team=team)
    if team.first:
        _report(out, progress)
    return result if team.first else None


def train_models(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool | Literal["auto"],
    overwrite: bool,
    progress: Progress,
    team: Team = ALONE,
) -> dict[str, Any]:
    """What `train_run` does, without the report."""
    check_alike(team, recipe, resume=resume, overwrite=overwrite, out=str(out))
    resuming = team.by_first(lambda: has_run(out) if resume == "auto" else resume)
    team.by_first(lambda: check_folder(out, recipe, resume=resuming, overwrite=overwrite))
    machine = team.together(lambda: _machine(recipe, team))
    agree = team.highest if team.size > 1 else None
    with repeatable(machine), _random_states_kept(), Interrupt(agree) as interrupt:
        corpus = team.in_turn(lambda: build_corpus(recipe.data))
        check_same_text(team, corpus)
        mesh = team.together(lambda: build_mesh(recipe, team, machine))
        around = Surroundings(recipe, machine, corpus, progress, interrupt, team, mesh)
        model = team.together(lambda: _model(around))
        team.together(lambda: check_placing(recipe, model, None if mesh is None else mesh.shape))
        introduce(around, model)
        with ExitStack() as held:
            held.enter_context(team.held_by_first(lambda: _folder(out)))
            dead = held.enter_context(team.held_by_first(lambda: writing(out)))
            held.enter_context(team.held_by_first(lambda: _nothing_half_begun(out, resuming)))
            if dead is not None:
                progress.say(f"process {dead}, which wrote this run before, died without giving it back")
            team.by_first(lambda: claim_folder(out, recipe, resume=resuming))
            team.by_first(lambda: corpus.tokenizer.save(out / TOKENIZER))
            return _train(around, model, out)


def _machine(recipe: Recipe, team: Team) -> Machine:
    settings = recipe.train
    return choose_machine(
        settings.device, settings.precision, settings.threads, local_rank=team.local_rank, sharing=team.local_size
    )


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
    lines = [
        around.machine.describe(),
        *company(recipe, model, None if around.mesh is None else around.mesh.shape),
        *(f"text: {line}" for line in around.corpus.describe()),
    ]
    lines.append(f"parameters: {_spaced(counts.total)} total, {_spaced(counts.active)} active")
    lines += [f"balance: {line}" for line in _balance(model)]
    if around.machine.device.type == "cpu" and _has_large(model) and keep_freed_memory():
        lines.append("memory: what a step frees stays with the process for the next step")
    tokens = recipe.train.batch_size * recipe.data.sequence_length
    lines.append(f"{recipe.train.steps} steps of {_spaced(tokens)} tokens, seed {recipe.seed}")
    for line in lines:
        around.progress.say(line)


def _has_large(model: DecoderLM) -> bool:
    """Whether a gradient is so large that the allocator would give its memory back after every step."""
    return any(parameter.nbytes >= MAPPED for parameter in model.parameters())


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
    twin = model.dense_twin(recipe.seed) if recipe.twin and recipe.model.method is not None else None
    result = _trained("moe" if recipe.model.method else "dense", model, out, around)
    if twin is None:
        return result
    counts = twin.parameter_counts()
    around.progress.say(f"dense twin: {_spaced(counts.total)} parameters, the same batches in the same order")
    result["twin"] = _trained("dense twin", twin, out / "twin", around)
    around.team.by_first(lambda: write_json(out / "result.json", result))
    return result


def _trained(name: str, model: DecoderLM, folder: Path, around: Surroundings) -> dict[str, Any]:
    result = around.team.by_first(lambda: _finished(folder))
    if result is None:
        return Training(name, model, folder, around).run()
    around.progress.say(f"{name}: finished before")
    return result


def _finished(folder: Path) -> dict[str, Any] | None:
    path = folder / "result.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


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
