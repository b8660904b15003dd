"""The half of `moestro plan` that reads the config.json of a released model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from moestro.cli.terminal import print_json, print_table, size

DTYPES = {"float32": 4, "bfloat16": 2, "8 bit": 1, "4 bit": 0.5}


def is_stock_config(path: Path | None) -> bool:
    """Whether a path means a config.json (or its folder) and not a recipe."""
    return path is not None and (path.suffix == ".json" or path.is_dir())


def plan_stock(path: Path, *, length: int, json: bool) -> None:
    """Print what the model of a config.json consists of; it is not built.

    Args:
        path: the config.json or its folder.
        length: tokens of a sequence, for the FLOPs of attention.
        json: print the numbers for machines.
    """
    from moestro.hf.counts import count_config

    counts = count_config(path, length=length)
    if json:
        print_json(dataclasses.asdict(counts))
        return
    active = counts.active_components
    rows = [{"": name, "total": n, "active": active.get(name, 0)} for name, n in counts.components.items()]
    rows.append({"": "all", "total": counts.total, "active": counts.active})
    print_table(rows, ("", "total", "active"), headers=(f"parameters of {counts.model_type}", "total", "active"))
    print()
    memory = [{"": name, "weights": size(counts.total * width)} for name, width in DTYPES.items()]
    print_table(memory, ("", "weights"), headers=("memory", "weights"))
    flops = f"{counts.flops_per_token:.3g}"
    print(f"\nforward FLOPs per token at {length} tokens: {flops}; training takes three times that")
