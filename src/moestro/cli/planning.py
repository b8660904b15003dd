"""What a recipe costs before it is trained: parameters, FLOPs, memory, and time by a short probe."""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from moestro.balance import RoutingLog
from moestro.cli.plan_mesh import plan_mesh
from moestro.data import Batch, open_tokenizer
from moestro.data.documents import DOMAINS, read_documents
from moestro.layers import MoE
from moestro.models import DecoderLM, build_language_model
from moestro.models import plan as plan_model
from moestro.train import Recipe
from moestro.train.build import build_model, takes_domains
from moestro.train.machine import Machine, choose_machine, repeatable
from moestro.train.optimiser import build_optimiser
from moestro.train.step import Stepper


def plan_run(recipe: Recipe, *, probe: bool = True, processes: int = 1) -> dict[str, Any]:
    """What training a recipe needs, as plain values.

    Args:
        recipe: see `moestro.train.load_recipe`.
        probe: run a few steps on random tokens, if they fit into memory; in this process.
        processes: more than one: also what each of them holds and sends, see `plan_mesh`.

    Raises:
        ValueError: a recipe that cannot be built, or that so many processes cannot share.
    """
    settings = recipe.train
    machine = choose_machine(settings.device, settings.precision, settings.threads)
    available = available_memory(machine.device)
    if processes < 1:
        raise ValueError(f"processes={processes}; pass at least 1")
    blueprints = _blueprints(recipe)
    parallel = plan_mesh(recipe, blueprints, machine, processes) if processes > 1 else None
    models = {name: _needs(recipe, model, machine, available) for name, model in blueprints.items()}
    fits = all(model["fits"] for model in models.values())
    if probe and fits:
        for name, model in models.items():
            model["tokens_per_second"] = _probe(recipe, blueprints[name], machine)
            model["seconds"] = _tokens(recipe) / model["tokens_per_second"]
    seconds = [model["seconds"] for model in models.values()]
    return {
        "machine": machine.describe(),
        "tokens": _tokens(recipe),
        "available_memory": available,
        "fits": fits,
        "seconds": None if None in seconds else sum(seconds),
        "models": models,
        "parallel": parallel,
    }


def _tokens(recipe: Recipe) -> int:
    return recipe.train.steps * recipe.train.batch_size * recipe.data.sequence_length


def _blueprints(recipe: Recipe) -> dict[str, DecoderLM]:
    """The models of a run on the meta device, where they take no memory."""
    length = recipe.data.sequence_length
    with torch.device("meta"):
        model = build_model(
            recipe.model,
            vocab_size=_vocab_size(recipe),
            sequence_length=length,
            seed=recipe.seed,
            num_domains=_num_domains(recipe),
        )
        with_twin = recipe.twin and recipe.model.method is not None
        return {"model": model, "dense twin": model.dense_twin()} if with_twin else {"model": model}


def _vocab_size(recipe: Recipe) -> int:
    """Ids of the tokenizer, without training it: `bpe:N` promises at most N."""
    kind, _, number = recipe.data.tokenizer.partition(":")
    if kind == "bpe" and number.isdecimal():
        return int(number)
    return open_tokenizer(recipe.data.tokenizer).vocab_size


def _num_domains(recipe: Recipe) -> int | None:
    """Sources of the text, which is looked through only for methods that have parts for each."""
    if not takes_domains(recipe.model.method):
        return None
    paths = list(recipe.data.paths)
    return len({document.domain for document in read_documents(paths)}) if paths else len(DOMAINS)


def _needs(recipe: Recipe, model: DecoderLM, machine: Machine, available: int) -> dict[str, Any]:
    rows = recipe.train.batch_size // recipe.train.accumulate
    model = model.to(machine.weights)
    found = plan_model(model, batch_size=rows, length=recipe.data.sequence_length, precision=machine.precision)
    return {
        "parameters": dataclasses.asdict(found.counts),
        "flops_per_token": found.flops_per_token,
        "training_flops": 3 * found.flops_per_token * _tokens(recipe),
        "memory": found.memory,
        "peak_memory": found.peak_memory,
        "fits": found.fits(available),
        "tokens_per_second": None,
        "seconds": None,
    }


def _probe(recipe: Recipe, blueprint: DecoderLM, machine: Machine, steps: int = 3) -> float:
    """Tokens per second of whole training steps on random tokens: the median after one to warm up."""
    shape = (recipe.train.batch_size, recipe.data.sequence_length)
    with repeatable(machine):
        model = build_language_model(**blueprint.config, seed=recipe.seed)
        model.to(machine.device, machine.weights)
        stepper = _stepper(recipe, model, machine)
        seconds = [_timed(stepper, model.vocab_size, shape) for _ in range(steps + 1)]
    return shape[0] * shape[1] / statistics.median(seconds[1:])


def _stepper(recipe: Recipe, model: DecoderLM, machine: Machine) -> Stepper:
    settings = recipe.train
    optimiser = build_optimiser(
        model,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        betas=(settings.beta1, settings.beta2),
    )
    sparse = any(isinstance(module, MoE) for module in model.modules())
    log = RoutingLog(model) if sparse else None
    compiled = torch.compile(model) if settings.compile else None
    return Stepper(
        model, optimiser, machine, log, accumulate=settings.accumulate, clip=settings.clip, compiled=compiled
    )


def _timed(stepper: Stepper, vocab_size: int, shape: tuple[int, int]) -> float:
    tokens = torch.randint(vocab_size, shape)
    batch = Batch(tokens, tokens, torch.zeros(shape, dtype=torch.uint8), tokens.numel())
    start = time.perf_counter()
    stepper(batch, 0)  # it reads the loss, so the work of a GPU is done when it returns
    return time.perf_counter() - start


def available_memory(device: torch.device) -> int:
    """Free bytes of a GPU, or of this computer within what its container allows."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([int(psutil.virtual_memory().available), *_container_memory()])


def _container_memory() -> list[int]:
    """What is left of the memory limit of a Linux container (cgroup 2), if there is one."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / f"memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:
        return []
    return [int(limit) - int(used)] if limit.isdecimal() else []
