"""`moestro train`: train a recipe and its dense twin."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from moestro.cli.flags import RecipeFlags, Whole, overrides
from moestro.cli.terminal import print_json, print_table

if TYPE_CHECKING:
    from moestro.train import Recipe
    from moestro.train.progress import Telling

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
  moestro train --processes 4 --mesh data=2,expert=2
  torchrun --nproc-per-node 4 -m moestro train --mesh expert=4 --out runs/four
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
    processes: Whole | None = None,
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
        processes: train in so many processes of this computer, which talk over loopback only; `--mesh` arranges
            them. torchrun starts them on several computers [default: this one].
        quiet: print the results only.
        json: print the results for machines, and progress to stderr.
        flags: see the sections below.
    """
    chosen, folder = choose(recipe, out, overrides(flags), resume=resume is not None)
    how: bool | Literal["auto"] = "auto" if resume else resume is not None
    result = _run(chosen, folder, processes, resume=how, overwrite=overwrite, telling=_telling(quiet, json))
    if result is None:
        return
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


def _run(
    recipe: Recipe,
    folder: Path,
    processes: int | None,
    *,
    resume: bool | Literal["auto"],
    overwrite: bool,
    telling: Telling,
) -> dict[str, Any] | None:
    """Train here, in processes that are started now, or as one of those that torchrun started."""
    from moestro.train.launch import called_by_torchrun, launch_run

    if called_by_torchrun():
        if processes is not None:
            raise ValueError("torchrun has started the processes already; leave --processes out")
        from moestro.train.worker import run_as_member

        return run_as_member(recipe, folder, resume=resume, overwrite=overwrite, telling=telling)
    if processes is not None and processes != 1:
        return launch_run(recipe, folder, processes, resume=resume, overwrite=overwrite, progress=telling)
    from moestro.train import train_run
    from moestro.train.progress import progress_of

    return train_run(recipe, folder, resume=resume, overwrite=overwrite, progress=progress_of(telling))


def _telling(quiet: bool, json: bool) -> Telling:
    return "silent" if quiet else "plain" if json else "default"
