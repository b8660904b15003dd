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
import transformers
from harness import Report, interleaved, parse

import moestro
from moestro.hf import use_experts


def main() -> None:
    arguments = parse(
        __doc__, repeat=9, layers=2, tokens=2048, experts=64, top_k=8, width=2048, hidden=1024, dtype="bfloat16"
    )
    report = Report("hf_record", arguments)
    config = transformers.OlmoeConfig(
        vocab_size=1024,
        hidden_size=arguments.width,
        intermediate_size=arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=16,
        num_experts=arguments.experts,
        num_experts_per_tok=arguments.top_k,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, arguments.dtype)).eval()
    use_experts(model)
    batch = torch.randint(2, 1024, (arguments.tokens // 512, 512))

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
