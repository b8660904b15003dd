"""What recording costs a transformers model: forward passes with and without `log.record(folder)`.

An OLMoE-shaped model on random tokens, without gradients, so that nothing but the forward hides the cost. The
two take turns; every recording streams a whole trace to a new folder and finishes it. Both passes are watched, so
the idle hooks of `moestro.watch` are in both.

    python benchmarks/hf_record.py --layers 2 --tokens 2048
"""

from __future__ import annotations

import tempfile
from itertools import count
from pathlib import Path

import torch
from harness import Report, interleaved, parse
from hf_shape import SHAPE, olmoe_shaped

import moestro
from moestro.hf import use_experts


def main() -> None:
    arguments = parse(__doc__, repeat=9, layers=2, **SHAPE)
    report = Report("hf_record", arguments)
    model, batch = olmoe_shaped(arguments)
    use_experts(model.eval())

    @torch.no_grad()
    def plain() -> None:
        model(input_ids=batch)

    with tempfile.TemporaryDirectory() as folder:
        log, number = moestro.watch(model), count()

        @torch.no_grad()
        def recorded() -> None:
            with log.record(Path(folder) / str(next(number))):
                model(input_ids=batch)

        seconds = interleaved({"plain": plain, "recorded": recorded}, report.repeat)
    for name in seconds:
        report.add(run=name, seconds=seconds[name], overhead=seconds[name] / seconds["plain"] - 1)
    report.finish()


if __name__ == "__main__":
    main()
