"""Training steps of an OLMoE-shaped transformers model: our experts against transformers' own.

One model, forward and backward of the language-model loss on random tokens; the implementations take turns.

    python benchmarks/hf_models.py --layers 4 --tokens 2048 --dtype bfloat16
"""

from __future__ import annotations

from functools import partial

import torch
import transformers
from harness import Report, interleaved, parse

from moestro.hf import use_experts


def step(model, batch, implementation):
    use_experts(model, implementation)
    model.zero_grad()
    model(input_ids=batch, labels=batch).loss.backward()


def main() -> None:
    arguments = parse(
        __doc__, repeat=3, layers=4, tokens=2048, experts=64, top_k=8, width=2048, hidden=1024, dtype="bfloat16",
        implementations="moestro,grouped_mm,eager", warm_up=1,
    )  # fmt: skip
    report = Report("hf_models", arguments)
    config = transformers.OlmoeConfig(
        vocab_size=1024,
        hidden_size=arguments.width,
        intermediate_size=arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=16,
        num_experts=arguments.experts,
        num_experts_per_tok=arguments.top_k,
        pad_token_id=0,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, arguments.dtype)).train()
    batch = torch.randint(1, 1024, (arguments.tokens // 512, 512))
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
