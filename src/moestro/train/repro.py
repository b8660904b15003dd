"""A step that failed, kept so that it can be run again alone: weights, optimiser, batch, random states, recipe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from moestro.balance import RoutingLog
from moestro.data import Batch
from moestro.layers import MoE
from moestro.train.build import build_model
from moestro.train.checkpoint_files import read_checkpoint, write_checkpoint
from moestro.train.durable import arriving, write_file
from moestro.train.errors import NonFiniteLoss
from moestro.train.machine import choose_machine, repeatable
from moestro.train.optimiser import build_optimiser, set_learning_rate
from moestro.train.recipe import Recipe, dump_recipe, load_recipe
from moestro.train.state import Checkpoint, restore
from moestro.train.step import Stepper
from moestro.train.team import ALONE, Team

DIAGNOSIS = "diagnosis.json"


@dataclass(frozen=True)
class FailedStep:
    """What a step that failed began with.

    Attributes:
        recipe: of the run.
        vocab_size, num_domains: of its text; the model is rebuilt from them.
        dense: whether it was the dense twin.
        learning_rate: of the step.
        state: weights, optimiser and generators before the step.
        batch: what it learned from.
        error: what was said of it.
    """

    recipe: Recipe
    vocab_size: int
    num_domains: int
    dense: bool
    learning_rate: float
    state: Checkpoint
    batch: Batch
    error: NonFiniteLoss


def write_repro(folder: Path, failed: FailedStep, team: Team = ALONE) -> None:
    """Write a failed step as a folder, whole or not at all; replaces the one before."""
    with team.held_by_first(lambda: _begun(folder, failed)) as staged:
        write_checkpoint(Path(staged) / "state", failed.state, team)


@contextmanager
def _begun(folder: Path, failed: FailedStep) -> Iterator[str]:
    """All but the state, which every process has a part of."""
    shutil.rmtree(folder, ignore_errors=True)
    with arriving(folder) as staged:
        tensors = {name: getattr(failed.batch, name) for name in ("tokens", "targets", "domain")}
        write_file(staged / "batch.safetensors", save(tensors))
        write_file(staged / "recipe.yaml", dump_recipe(failed.recipe).encode())
        write_file(staged / DIAGNOSIS, json.dumps(_facts(failed), indent=2).encode())
        yield str(staged)


def _facts(failed: FailedStep) -> dict[str, Any]:
    error = failed.error
    facts = {name: getattr(failed, name) for name in ("vocab_size", "num_domains", "dense", "learning_rate")}
    said = {"message": str(error), "step": error.step, "kind": error.kind, "name": error.name}
    return {**facts, **said, "num_bytes": failed.batch.num_bytes}


def replay_step(folder: str | Path) -> dict[str, Any]:
    """Run a kept step alone.

    Returns: `step`, `before` (what was said when it failed), `now` (what is said this time, None if the step is
    finite here), `name` of the first bad module, and `loss` and `grad_norm` of a finite one.

    Raises:
        ValueError: the folder holds no kept step, or a damaged one.
    """
    folder = Path(folder)
    if not (folder / DIAGNOSIS).is_file():
        raise ValueError(f"{folder} holds no kept step; give the folder repro/ of a run that met a bad number")
    facts = json.loads((folder / DIAGNOSIS).read_bytes())
    recipe, state = load_recipe(folder / "recipe.yaml"), read_checkpoint(folder / "state")
    machine = choose_machine(recipe.train.device, recipe.train.precision, recipe.train.threads)
    with repeatable(machine):
        stepper = _stepper(recipe, facts, state, machine)
        batch = Batch(**load_file(folder / "batch.safetensors"), num_bytes=facts["num_bytes"])
        answer = {"step": facts["step"], "before": facts["message"], "now": None, "name": ""}
        try:
            result = stepper(batch, facts["step"])
        except NonFiniteLoss as error:
            return answer | {"now": str(error), "name": error.name}
        return answer | {"loss": result.loss, "grad_norm": result.grad_norm}


def _stepper(recipe: Recipe, facts: dict[str, Any], state: Checkpoint, machine: Any) -> Stepper:
    settings = recipe.train
    model = build_model(
        recipe.model,
        vocab_size=facts["vocab_size"],
        sequence_length=recipe.data.sequence_length,
        seed=recipe.seed,
        num_domains=facts["num_domains"],
    )
    if facts["dense"] and recipe.model.method:
        model = model.dense_twin(recipe.seed)
    model.to(machine.device, machine.weights)
    optimiser = build_optimiser(
        model,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        betas=(settings.beta1, settings.beta2),
    )
    restore(state, model, optimiser)
    set_learning_rate(optimiser, facts["learning_rate"])
    sparse = any(isinstance(module, MoE) for module in model.modules())
    return Stepper(
        model,
        optimiser,
        machine,
        RoutingLog(model, layers=settings.layers) if sparse else None,
        accumulate=settings.accumulate,
        clip=settings.clip,
        statistics=settings.statistics,
    )


def with_random_state(state: Checkpoint, random_state: torch.Tensor) -> Checkpoint:
    """A captured state whose torch generator is the one that the failed step began with."""
    return replace(state, tensors={**state.tensors, "random.torch": random_state})
