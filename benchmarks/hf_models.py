"""Training steps of an OLMoE-shaped transformers model: our experts against transformers' own.

One model, forward and backward of the language-model loss on random tokens; the implementations take turns.

    python benchmarks/hf_models.py --layers 4 --tokens 2048 --dtype bfloat16
"""

from __future__ import annotations

from functools import partial

from harness import Report, interleaved, parse
from hf_shape import SHAPE, olmoe_shaped

from moestro.hf import use_experts


def step(model, batch, implementation):
    use_experts(model, implementation)
    model.zero_grad()
    model(input_ids=batch, labels=batch).loss.backward()


def main() -> None:
    arguments = parse(__doc__, repeat=3, layers=4, **SHAPE, implementations="moestro,grouped_mm,eager", warm_up=1)
    report = Report("hf_models", arguments)
    model, batch = olmoe_shaped(arguments)
    model.train()
    names = arguments.implementations.split(",")
    seconds = interleaved(
        {name: partial(step, model, batch, name) for name in names}, report.repeat, arguments.warm_up
    )
    for name in names:
        ratio = seconds[name] / seconds[names[0]]
        report.add(
            experts=name,
            seconds=seconds[name],
            times_ours=ratio,
            tokens_per_second=arguments.tokens / seconds[name],
        )
    report.finish()


if __name__ == "__main__":
    main()
