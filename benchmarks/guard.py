"""What looking for bad numbers in all weights and optimiser state costs a training step.

The model of `recipes/first.yaml` on random bytes, looked at never and at every step, in turn; the look alone is
timed too, and stands as a share of the step without it.

    python benchmarks/guard.py --threads 2
"""

from __future__ import annotations

from itertools import count

import torch
from harness import Report, interleaved, parse

from moestro import RoutingLog
from moestro.data import Batch
from moestro.train import load_recipe
from moestro.train.build import build_model
from moestro.train.machine import choose_machine, repeatable
from moestro.train.optimiser import build_optimiser
from moestro.train.step import Stepper

EVERY = 8


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
        never, always = (
            Stepper(model, optimiser, machine, log, clip=train.clip, check_every=every) for every in (0, 1)
        )
        steps = {
            "never": lambda: never(batch, next(number)),
            "every step": lambda: always(batch, next(number)),
            "the look alone": always._sound,
        }
        seconds = interleaved(steps, report.repeat)
    step, look = seconds["never"], seconds["the look alone"]
    rows = {"every step": seconds["every step"] / step - 1, "look / step": look / step}
    rows |= {f"look / step / {EVERY}": look / step / EVERY}
    for name, share in rows.items():
        report.add(checked=name, precision=machine.precision_name, step=step, overhead=f"{share:+.2%}")
    report.finish()


if __name__ == "__main__":
    main()
