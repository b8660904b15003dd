"""The half of `moestro plan` about several processes: who holds what, and what crosses which link."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moestro.cli.terminal import print_table, size
from moestro.layers import MoE
from moestro.models import DecoderLM
from moestro.parallel import MeshShape
from moestro.train import Recipe
from moestro.train.build import run_mesh
from moestro.train.machine import Machine


def plan_mesh(recipe: Recipe, models: Mapping[str, DecoderLM], machine: Machine, processes: int) -> dict[str, Any]:
    """What each of several processes holds and sends, as plain values.

    Bytes sent are those of one process in one optimiser step; rows are those of the linear transport, forward and
    backward, while every expert gets as many tokens:

        to each process with other experts      4 * rows * width * bytes of a number,  rows = tokens * k / expert
        to each process with other slices       4 * tokens * k * width * bytes of a number
        gradients, as a ring adds up n numbers  2 (p - 1) / p * n * bytes of a number, p = those that hold them
        of a dense part that is shared out      (p - 1) / p * n * bytes of a number in every micro-batch, twice for
                                                the weights (three times with statistics="step") and once for the
                                                gradients

    Args:
        recipe: `parallel.mesh` says how the processes are arranged.
        models: of the run, by name; may live on the meta device.
        machine: its precision is that of rows on the wire.
        processes: of the run.

    Raises:
        ValueError: a mesh that these processes do not fill, or experts or a batch that do not divide over it.
    """
    shape = run_mesh(recipe, processes)
    tokens = recipe.train.batch_size * recipe.data.sequence_length // shape.dense
    return {
        "mesh": shape.words,
        "processes": processes,
        "transport": recipe.parallel.transport,
        "experts": recipe.model.num_experts // shape.expert if recipe.model.method else 0,
        "tokens": tokens,
        "models": {name: _of_model(recipe, model, machine, shape, tokens) for name, model in models.items()},
    }


def _of_model(
    recipe: Recipe, model: DecoderLM, machine: Machine, shape: MeshShape, tokens: int
) -> dict[str, dict[str, int]]:
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    number = machine.weights.itemsize
    experts = sum(p.numel() for layer in layers for p in layer.experts.parameters())
    dense = sum(p.numel() for p in model.parameters()) - experts
    held = experts // (shape.expert * shape.tensor)
    parallel, passes = recipe.parallel, recipe.train.accumulate
    share = dense // shape.dense
    here = share if parallel.shard_dense else dense
    keeps = held // shape.data + share if parallel.shard_optimiser else held + here
    half = _ring(dense, shape.dense) / 2  # what each sends where all get what each has a share of, or the reverse
    again = recipe.train.statistics == "step" and passes > 1
    weights = round((2 + again) * passes * half) if parallel.shard_dense else 0
    gradients = (passes * half if parallel.shard_dense else 2 * half) + _ring(held, shape.data)
    row = model.embedding.weight.shape[1] * machine.precision.itemsize
    rows = sum(round(4 * tokens * layer.top_k * row) for layer in layers)
    memory = {"weights": held + here, "gradients": held + here, "optimiser": 2 * keeps}
    return {
        "memory": {name: numbers * number for name, numbers in memory.items()},
        "sent": {
            "rows to each process with other experts": rows // shape.expert if shape.expert > 1 else 0,
            "rows to each process with other slices": rows if shape.tensor > 1 else 0,
            "rows in all": rows * (shape.expert - 1) // shape.expert + rows * (shape.tensor - 1),
            "dense weights": weights * number,
            "gradients": round(gradients) * number,
        },
    }


def _ring(numbers: int, processes: int) -> float:
    """What each process of a ring sends to add so many numbers up."""
    return 2 * (processes - 1) / processes * numbers


def print_mesh(facts: Mapping[str, Any]) -> None:
    """Print what `plan_mesh` found as a table."""
    models = facts["models"]
    first = next(iter(models.values()))
    rows = [
        {"": name if section == "memory" else f"sends {name}", **_sizes(models, section, name)}
        for section in ("memory", "sent")
        for name in first[section]
        if any(model[section][name] for model in models.values())
    ]
    print_table(rows, ("", *models), headers=(f"each of {facts['processes']} processes", *models))
    print(
        f"mesh {facts['mesh']}: {facts['experts']} experts of every layer and {facts['tokens']} tokens a step each"
    )
    if facts["transport"] != "linear":
        print(f"rows as the linear transport sends them; docs/parallel.md compares it with {facts['transport']}")


def _sizes(models: Mapping[str, Any], section: str, name: str) -> dict[str, str]:
    return {title: size(model[section][name]) for title, model in models.items()}
