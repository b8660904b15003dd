"""`moestro study`: train many methods under equal conditions and compare them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from moestro.cli.flags import Whole
from moestro.cli.terminal import print_json, print_table

app = App(
    name="study",
    help_epilogue="""\
Every method gets the active parameters of the dense model, the same tokens in the same order, and every seed.
The same command goes on with a study that was stopped; what is finished is kept.

Examples:
  moestro study study
  moestro study recipes/study.yaml --workers 2 --out runs/study
  moestro leaderboard runs/study > docs/leaderboard.md""",
)
COLUMNS = {
    "rank": "rank",
    "label": "method",
    "bits": "bits per byte",
    "difference": "against dense",
    "speed": "speed",
    "load_cv": "load CV",
    "dropped": "dropped",
    "dead": "dead experts",
    "remarks": "remarks",
}


@app.default
def study(
    recipe: Path,
    /,
    *,
    out: Path | None = None,
    workers: Whole = 1,
    quiet: Annotated[bool, Parameter(alias="-q", negative=(), show_default=False)] = False,
    json: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
) -> None:
    """Train many methods under equal conditions and compare them.

    Args:
        recipe: YAML recipe of the study, or the name of a shipped one (study, study-first).
        out: folder of the study [default: runs/RECIPE].
        workers: trainings at a time, each in its own process.
        quiet: print the table only.
        json: print the content of study.json, and progress to stderr.
    """
    from moestro.study import load_study, run_study
    from moestro.study.display import Display

    folder = out or Path("runs") / recipe.stem
    display = Display(sys.stderr if json else None, quiet=quiet)
    result = run_study(load_study(recipe), folder, workers=workers, display=display)
    if json:
        print_json(result)
        return
    print()
    print_table([table_row(row) for row in result["rows"]], tuple(COLUMNS), tuple(COLUMNS.values()))
    print(f"\npage: {folder / 'study.html'}")


def table_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of study.json as the command prints it."""
    from moestro.inspect.study_words import difference, interval, remarks

    return {
        **row,
        "bits": interval(row["bits_per_byte"]),
        "difference": difference(row),
        "speed": None if row["speed"] is None else round(row["speed"]["relative"], 2),
        "dropped": None if row["dropped"] is None else f"{row['dropped']:.1%}",
        "dead": row["dead_experts"],
        "remarks": remarks(row),
    }
