"""What looking for bad numbers in weights and optimiser state costs a training step.

The model of `recipes/first.yaml` on random bytes, in turn: steps that look at loss and gradient only, steps as
`moestro train` takes them (state at every step, each weight once in 8), and steps that look at all of it. Inside
each step the look is timed alone: steps differ among themselves by more than a look costs.

    python benchmarks/guard.py --threads 2
    python benchmarks/guard.py --threads 2 --precision float32
"""

from __future__ import annotations

import time
from itertools import count
from statistics import median

import torch
from harness import Report, interleaved, parse

from moestro import RoutingLog
from moestro.data import Batch
from moestro.train import load_recipe
from moestro.train.build import build_model
from moestro.train.machine import choose_machine, repeatable
from moestro.train.optimiser import build_optimiser
from moestro.train.sound import Soundness
from moestro.train.step import Stepper

EVERY = {"never": 0, "state, and weights in turn": 8, "everything": 1}


class Timed:
    """A look at a step's numbers that notes how long it takes."""

    def __init__(self, look: Soundness):
        self.look, self.every, self.buffers = look, look.every, look.buffers
        self.seconds: list[float] = []

    def __call__(self, step: int) -> bool:
        started = time.perf_counter()
        answer = self.look(step)
        self.seconds.append(time.perf_counter() - started)
        return answer


def main() -> None:
    arguments = parse(__doc__, repeat=120, recipe="first", precision="auto", method="")
    recipe = load_recipe(arguments.recipe, {"model.method": arguments.method} if arguments.method else None)
    report = Report("guard", arguments)
    train, length = recipe.train, recipe.data.sequence_length
    machine = choose_machine("cpu", arguments.precision, arguments.threads)
    with repeatable(machine):
        model = build_model(recipe.model, vocab_size=256, sequence_length=length, seed=recipe.seed)
        optimiser = build_optimiser(model, learning_rate=1e-5, weight_decay=0.1, betas=(0.9, 0.95))
        log, number = RoutingLog(model), count(1)
        tokens = torch.randint(256, (train.batch_size, length + 1))
        batch = Batch(
            tokens[:, :-1].contiguous(),
            tokens[:, 1:].contiguous(),
            torch.zeros(train.batch_size, length, dtype=torch.uint8),
            tokens[:, 1:].numel(),
        )
        steppers = {
            name: Stepper(model, optimiser, machine, log, clip=train.clip, check_every=every)
            for name, every in EVERY.items()
        }
        looks = {name: Timed(stepper.sound) for name, stepper in steppers.items()}
        for name, stepper in steppers.items():
            stepper.sound = looks[name]
        steps = {name: lambda stepper=stepper: stepper(batch, next(number)) for name, stepper in steppers.items()}
        seconds = interleaved(steps, report.repeat)
    step = seconds["never"]
    for name, look in looks.items():
        alone, whole = median(look.seconds or [0.0]), seconds[name] / step - 1
        report.add(
            looked_at=name,
            precision=machine.precision_name,
            step=seconds[name],
            look_ms=round(1000 * alone, 3),
            look_share=f"{alone / step:.2%}",
            step_share=f"{whole:+.2%}",
        )
    report.finish()


if __name__ == "__main__":
    main()
