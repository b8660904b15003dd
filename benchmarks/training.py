"""Training steps of the first recipe's model, as a share of its dense twin's speed, and beside transformers.

Whole optimiser steps as `moestro train` takes them (bfloat16 products, float32 weights, auxiliary loss, clipping,
AdamW), on random bytes. First the two take turns: `of_twin` is the twin's seconds / ours; the twin has the active
parameters only, so the optimiser's share of the others is counted too. Then ours and transformers' Mixtral take
turns, of our sizes and with the same optimiser, precision, auxiliary loss and clipping; its products are of other
shapes at every step, which oneDNN's cache of 1024 kernels has to hold beside ours.

    python benchmarks/training.py [--recipe recipes/first.yaml]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

if "OMP_WAIT_POLICY" not in os.environ:  # as the command does, before torch is there
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "1000")}

import torch
from harness import Report, interleaved, parse, peer

from moestro.balance import RoutingLog
from moestro.data import Batch
from moestro.kernels.allocator import keep_freed_memory
from moestro.models import DecoderLM, build_dense_twin
from moestro.train.build import build_model
from moestro.train.machine import Machine, choose_machine, repeatable
from moestro.train.optimiser import build_optimiser
from moestro.train.recipe import Recipe, load_recipe
from moestro.train.step import Stepper

PATHS = ("grouped_mm", "eager")  # batched_mm copies the weights of every choice: 10 GB here
BYTES = 256


class Steps:
    """Optimiser steps of one model on one batch of random bytes."""

    def __init__(self, recipe: Recipe, machine: Machine) -> None:
        self.recipe, self.machine = recipe, machine
        tokens = torch.randint(BYTES, (recipe.train.batch_size, recipe.data.sequence_length + 1))
        domain = torch.zeros_like(tokens[:, 1:], dtype=torch.uint8)
        self.batch = Batch(tokens[:, :-1], tokens[:, 1:], domain, tokens[:, 1:].numel())
        self.moe = build_model(
            recipe.model, vocab_size=BYTES, sequence_length=recipe.data.sequence_length, seed=recipe.seed
        )

    def ours(self, model: DecoderLM) -> Callable[[], Any]:
        """A step as `moestro train` takes it."""
        log = RoutingLog(model) if model is self.moe else None
        settings = self.recipe.train
        stepper = Stepper(
            model, self.optimiser(model), self.machine, log, clip=settings.clip, check_every=settings.check_every
        )
        count = iter(range(1, sys.maxsize))
        return lambda: stepper(self.batch, next(count))

    def optimiser(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        settings = self.recipe.train
        return build_optimiser(
            model,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            betas=(settings.beta1, settings.beta2),
        )

    def theirs(self, path: str) -> Callable[[], Any]:
        """The same step with transformers' Mixtral and one of its back ends."""
        model = mixtral(self.moe, path)
        optimiser, clip = self.optimiser(model), self.recipe.train.clip
        coefficient = self.recipe.model.options.get("balance", 0.0)

        def step() -> float:
            optimiser.zero_grad(set_to_none=True)
            with self.machine.autocast():
                out = model(input_ids=self.batch.tokens, output_router_logits=True, use_cache=False)
            logits = out.logits.float().flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, self.batch.targets.flatten())
            (loss + coefficient * out.aux_loss).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimiser.step()
            return float(loss.detach())

        return step


def mixtral(ours: DecoderLM, path: str) -> torch.nn.Module:
    """transformers' Mixtral with the sizes of our model."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = ours.config
    config = MixtralConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["width"],
        intermediate_size=sizes["expert_hidden"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["num_kv_heads"] or sizes["num_heads"],
        num_local_experts=sizes["num_experts"],
        num_experts_per_tok=sizes["options"].get("top_k", 2),
        tie_word_embeddings=sizes["tied_embeddings"],
        experts_implementation=path,
    )
    model = MixtralForCausalLM(config).train()
    parameters, expected = count(model), count(ours)
    if abs(parameters - expected) > 0.02 * expected:
        raise SystemExit(f"transformers' model has {parameters} parameters, ours {expected}: not of equal shape")
    return model


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def add(report: Report, steps: Steps, name: str, seconds: float, **ratios: float | None) -> None:
    report.add(model=name, ms=1e3 * seconds, tokens_per_second=steps.batch.tokens.numel() / seconds, **ratios)


def main() -> None:
    arguments = parse(__doc__, repeat=9, recipe="recipes/first.yaml", malloc="keep")
    report = Report("training", arguments)
    if arguments.malloc == "keep":
        keep_freed_memory()
    recipe = load_recipe(arguments.recipe)
    steps = Steps(recipe, choose_machine("cpu", recipe.train.precision, arguments.threads))
    ours, twin = steps.ours(steps.moe), steps.ours(build_dense_twin(steps.moe, 0))
    with repeatable(steps.machine):
        pair = interleaved({"moestro": ours, "dense twin": twin}, report.repeat, warm_up=6)
    of_twin = pair["dense twin"] / pair["moestro"]
    add(report, steps, "dense twin", pair["dense twin"], of_twin=1.0, times_ours=of_twin)
    add(report, steps, "moestro", pair["moestro"], of_twin=of_twin, times_ours=1.0)
    if peer("transformers") is not None:
        peers = {f"transformers {path}": steps.theirs(path) for path in PATHS}
        with repeatable(steps.machine):
            seconds = interleaved({"moestro": ours, **peers}, report.repeat, warm_up=4)
        for name in peers:
            add(report, steps, name, seconds[name], of_twin=None, times_ours=seconds[name] / seconds["moestro"])
    report.finish()


if __name__ == "__main__":
    main()
