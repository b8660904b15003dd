"""How fast a method trains beside the dense model, measured in turns."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from moestro.balance import RoutingLog
from moestro.data import Corpus
from moestro.layers import MoE
from moestro.train.build import build_corpus, build_model, training_batches
from moestro.train.machine import Machine, choose_machine, repeatable
from moestro.train.optimiser import build_optimiser
from moestro.train.recipe import Recipe
from moestro.train.seeds import seed_everything
from moestro.train.step import Stepper

ROUNDS, STEPS = 7, 4
WARM_UP = 7
"""Rounds before the clock counts: a CPU compiles bfloat16 products for every new number of rows of an expert, and
a small mixture took 25 steps to fall from 47 to 32 ms."""


def measure_speed(recipe: Recipe, dense: Recipe) -> dict[str, Any]:
    """Whole training steps of a method and of the dense model in turns, so that both meet the same disturbances.

    On one CPU thread the clock counts the time that the processor spends on this process, which other processes do
    not lengthen; otherwise it is the wall clock.

    Args:
        recipe: of the method.
        dense: of the dense model.

    Returns: `relative`, tokens per second of the method over those of the dense model, the median of 7 rounds of 4
    steps each; `lowest` and `highest` of the rounds; `tokens_per_second` of both, and the `clock`.
    """
    machine = choose_machine(recipe.train.device, recipe.train.precision, recipe.train.threads)
    one_thread = machine.device.type == "cpu" and machine.threads == 1
    clock = time.process_time if one_thread else time.perf_counter
    corpus = build_corpus(recipe.data)
    with repeatable(machine):
        steps = [_steps(of, machine, corpus, clock) for of in (recipe, dense)]
        for step in steps * WARM_UP:
            step()
        rounds = [(steps[0](), steps[1]()) for _ in range(ROUNDS)]
    ratios = [of_dense / of_method for of_method, of_dense in rounds]
    tokens = STEPS * recipe.train.batch_size * recipe.data.sequence_length
    return {
        "relative": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "tokens_per_second": tokens / statistics.median(of_method for of_method, _ in rounds),
        "dense_tokens_per_second": tokens / statistics.median(of_dense for _, of_dense in rounds),
        "clock": "processor time" if one_thread else "wall time",
    }


def _steps(recipe: Recipe, machine: Machine, corpus: Corpus, clock: Callable[[], float]) -> Callable[[], float]:
    """A function that trains for some steps and answers how long they took."""
    seed_everything(recipe.seed)
    settings = recipe.train
    model = build_model(
        recipe.model,
        vocab_size=corpus.tokenizer.vocab_size,
        sequence_length=recipe.data.sequence_length,
        seed=recipe.seed,
        num_domains=len(corpus.domains),
    ).to(machine.device)
    optimiser = build_optimiser(
        model,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        betas=(settings.beta1, settings.beta2),
    )
    log = RoutingLog(model) if any(isinstance(module, MoE) for module in model.modules()) else None
    stepper = Stepper(model, optimiser, machine, log, accumulate=settings.accumulate, clip=settings.clip)
    batches, done = training_batches(corpus, recipe), itertools.count()

    def run() -> float:
        started = clock()
        for step in itertools.islice(done, STEPS):
            stepper(batches.at(step), step + 1)
        if machine.device.type == "cuda":
            torch.cuda.synchronize(machine.device)
        return clock() - started

    return run
