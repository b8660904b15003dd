"""What processes really send in a step in which every expert gets as many tokens, to hold a plan against."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from moestro.cli.planning import plan_run
from moestro.layers import MoE, spread
from moestro.parallel import Mesh
from moestro.train import load_recipe
from moestro.train.build import build_model, run_mesh


def sent(rank: int, argument: dict[str, Any]) -> dict[str, list[int]]:
    """By mesh: bytes of rows that this rank sent, and as the plan has them."""
    found = {}
    for words in argument["meshes"]:
        recipe = load_recipe(None, argument["recipe"] | {"parallel": {"mesh": words}})
        shape = run_mesh(recipe, torch.distributed.get_world_size())
        length, k = recipe.data.sequence_length, 2
        model = build_model(recipe.model, vocab_size=256, sequence_length=length, seed=0)
        for module in model.modules():
            if isinstance(module, MoE):
                module.router.select.register_forward_hook(_evenly)
        network = spread(model, Mesh(shape), transport="linear")
        tokens = torch.randint(256, (recipe.train.batch_size // shape.dense, length))
        assert tokens.numel() * k % recipe.model.num_experts == 0
        model(tokens).square().sum().backward()
        traffic, models = network.traffic, plan_run(recipe, probe=False, processes=4)["parallel"]["models"]
        rows = (
            traffic.bytes()
            - traffic.bytes(link="self")
            - traffic.bytes("counts")
            + traffic.bytes("counts", link="self")
        )
        found[words] = [rows, models["model"]["sent"]["rows in all"]]
    return found


def _evenly(module: Any, given: Any, chosen: Any) -> Any:
    tokens, k = chosen.index.shape
    return replace(chosen, index=(torch.arange(tokens * k) % 4).view(tokens, k))
