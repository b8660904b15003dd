"""`moestro plan`: say what a recipe costs before it is trained."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from moestro.cli.flags import RecipeFlags, Whole, overrides
from moestro.cli.plan_stock import is_stock_config, plan_stock
from moestro.cli.terminal import duration, print_json, print_table, size

app = App(
    name="plan",
    help_epilogue="""\
Examples:
  moestro plan recipes/first.yaml
  moestro plan recipes/first.yaml --model.num-experts 64 --no-probe
  moestro plan --method switch --json
  moestro plan --processes 4 --mesh data=2,expert=2
  moestro plan Mixtral-8x7B/config.json --length 4096""",
)


@app.default
def plan(
    recipe: Path | None = None,
    /,
    *,
    processes: Whole | None = None,
    probe: bool = True,
    length: Whole = 2048,
    json: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    flags: RecipeFlags = None,
) -> None:
    """Say what a recipe costs before it is trained.

    Args:
        recipe: YAML recipe, whose keys the options below override [default: the first recipe]; or the
            config.json of a released model, or its folder: parameters and FLOPs without building it.
        processes: also say what each of so many processes would hold and send; `--mesh` arranges them.
        probe: train a few steps on random tokens to learn the speed.
        length: only for a config.json: tokens of a sequence.
        json: print the numbers for machines.
    """
    if recipe is not None and is_stock_config(recipe):
        plan_stock(recipe, length=length, json=json)
        return
    from moestro.cli.planning import plan_run
    from moestro.train import load_recipe

    facts = plan_run(load_recipe(recipe, overrides(flags)), probe=probe, processes=processes or 1)
    print_json(facts) if json else _print(facts)


def _print(facts: dict[str, Any]) -> None:
    from moestro.cli.plan_mesh import print_mesh

    models = facts["models"]
    print(facts["machine"])
    tables = {"parameters": _parameter_rows, "memory": _memory_rows, "speed": _speed_rows}
    for name, rows in tables.items():
        print()
        print_table(rows(models), ("", *models), headers=(name, *models))
    if facts["parallel"]:
        print()
        print_mesh(facts["parallel"])
    print(f"\n{_verdict(facts)}")


def _row(label: str, models: dict[str, Any], values: Iterable[Any]) -> dict[str, Any]:
    """A row with a label and one value for each model."""
    return {"": label, **dict(zip(models, values, strict=True))}


def _parameter_rows(models: dict[str, Any]) -> list[dict[str, Any]]:
    counts = [model["parameters"] for model in models.values()]
    names = dict.fromkeys(name for count in counts for name in count["components"])
    rows = [_row(name, models, [count["components"].get(name, 0) for count in counts]) for name in names]
    used = [row for row in rows if any(row[model] for model in models)]
    return used + [_row(name, models, [count[name] for count in counts]) for name in ("total", "active")]


def _memory_rows(models: dict[str, Any]) -> list[dict[str, Any]]:
    memories = [model["memory"] | {"peak": model["peak_memory"]} for model in models.values()]
    return [_row(name, models, [size(memory[name]) for memory in memories]) for name in memories[0]]


def _speed_rows(models: dict[str, Any]) -> list[dict[str, Any]]:
    plans = models.values()
    return [
        _row("forward FLOPs per token", models, [plan["flops_per_token"] for plan in plans]),
        _row("FLOPs of the whole training", models, [f"{plan['training_flops']:.3g}" for plan in plans]),
        _row("tokens per second", models, [plan["tokens_per_second"] for plan in plans]),
        _row("time to finish", models, [duration(plan["seconds"]) for plan in plans]),
    ]


def _verdict(facts: dict[str, Any]) -> str:
    peak = max(model["peak_memory"] for model in facts["models"].values())
    fits = "fits" if facts["fits"] else "does not fit"
    memory = f"{fits} into memory: {size(peak)} at the peak, {size(facts['available_memory'])} available"
    return memory if facts["seconds"] is None else f"{memory}; done in about {duration(facts['seconds'])}"
