"""`moestro train`: train a recipe and its dense twin."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from moestro.cli.flags import RecipeFlags, overrides
from moestro.cli.terminal import print_json, print_table

if TYPE_CHECKING:
    from moestro.train import Progress, Recipe

app = App(
    name="train",
    help_epilogue="""\
Ctrl-C once finishes the step, saves and stops; `--resume` continues. A run that died, however suddenly, goes on
from its newest whole checkpoint, one every train.checkpoint-every steps: `moestro checkpoints RUN` lists them.

Examples:
  moestro train
  moestro train recipes/first.yaml --method switch --seed 1
  moestro train --data.paths shakespeare.txt --steps 200 --out runs/shakespeare
  moestro train --model.width 64 --train.learning-rate 1e-3 --model.options.top-k 1
  moestro train --out runs/shakespeare --resume
  moestro train recipes/first.yaml --out runs/night --resume auto --train.checkpoint-every 50""",
)
COLUMNS = {
    "name": "model",
    "validation_bits_per_byte": "validation bits per byte",
    "tokens_per_second": "tokens/s",
    "active_parameters": "active parameters",
    "total_parameters": "total parameters",
    "seconds": "seconds",
}


@app.default
def train(
    recipe: Path | None = None,
    /,
    *,
    out: Path | None = None,
    resume: Annotated[
        list[Literal["auto"]] | None, Parameter(consume_multiple=(0, 1), negative=(), show_default=False)
    ] = None,
    overwrite: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    quiet: Annotated[bool, Parameter(alias="-q", negative=(), show_default=False)] = False,
    json: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    flags: RecipeFlags = None,
) -> None:
    """Train a Mixture-of-Experts language model and its dense twin.

    Args:
        recipe: YAML recipe; every option below overrides one of its keys [default: the first recipe].
        out: folder of the run [default: runs/RECIPE-seedN].
        resume: continue the run that the folder holds from its newest whole checkpoint, with its recipe if none
            is named; `--resume auto` starts it where there is none.
        overwrite: replace the run that the folder holds.
        quiet: print the results only.
        json: print the results for machines, and progress to stderr.
        flags: see the sections below.
    """
    from moestro.train import train_run

    chosen, folder = choose(recipe, out, overrides(flags), resume=resume is not None)
    progress = _progress(quiet, json)
    how: bool | Literal["auto"] = "auto" if resume else resume is not None
    result = train_run(chosen, folder, resume=how, overwrite=overwrite, progress=progress)
    if json:
        print_json({**result, "folder": str(folder)})
        return
    print()
    print_table([result, *([result["twin"]] if "twin" in result else [])], tuple(COLUMNS), tuple(COLUMNS.values()))
    for line in (*experts_in_words(result), *time_in_words(result)):
        print(line)
    page = folder / "report.html"
    print(f"\nreport: {page if page.is_file() else f'none yet; moestro report {folder} writes it'}")


def experts_in_words(result: dict[str, Any]) -> list[str]:
    """What the last evaluation saw of the experts; nothing of a dense model."""
    if "dead_experts" not in result:
        return []
    share, dead = 100 * result["smallest_share"], result["dead_experts"]
    lines = ["", f"experts: {dead} dead; the least used serves {share:.1f} % of its layer's tokens"]
    domains = result.get("domains", [])
    if len(domains) > 1:
        apart, information = max(result["told_apart"]), max(result["normalised_mutual_information"])
        lines.append(
            f"{' and '.join(domains)}: one choice of the best layer tells them apart {100 * apart:.1f} % "
            f"of the time (blindly {100 / len(domains):.1f} %); normalised mutual information {information:.4f}"
        )
    return lines


def time_in_words(result: dict[str, Any]) -> list[str]:
    """Where the time of each model went."""
    from moestro.train.goodput import in_words

    models = [result, *([result["twin"]] if "twin" in result else [])]
    return [f"{model['name']}: {in_words(model['goodput'])}" for model in models if "goodput" in model]


def choose(recipe: Path | None, out: Path | None, given: dict[str, Any], *, resume: bool) -> tuple[Recipe, Path]:
    """The recipe of a run and its folder, `runs/RECIPE-seedN` unless another is named.

    Args:
        recipe: file; None = the first recipe or, to resume, the one that the run's folder keeps.
        out: folder.
        given: values that replace the recipe's.
        resume: whether the run exists.
    """
    from moestro.train import load_recipe

    chosen = load_recipe(recipe, given)
    folder = out or Path("runs") / f"{recipe.stem if recipe else 'first'}-seed{chosen.seed}"
    kept = folder / "recipe.yaml"
    return (load_recipe(kept, given) if resume and recipe is None and kept.is_file() else chosen), folder


def _progress(quiet: bool, json: bool) -> Progress | None:
    from moestro.train.progress import PlainLines, Silent

    return Silent() if quiet else PlainLines(sys.stderr) if json else None
