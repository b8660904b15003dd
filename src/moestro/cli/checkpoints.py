"""`moestro checkpoints`: what a run could be resumed from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from moestro.cli.terminal import print_json, print_table

app = App(
    name="checkpoints",
    help_epilogue="""\
Examples:
  moestro checkpoints runs/first-seed0
  moestro checkpoints runs/first-seed0 --verify""",
)


@app.default
def checkpoints(
    run: Path,
    /,
    *,
    verify: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> int:
    """List the checkpoints of a run, and verify them.

    Args:
        run: folder of a run.
        verify: read every byte, compare it with the manifest and print the speed; exit code 1 if one is damaged.
        json: print the rows for machines.
    """
    from moestro.train import run_checkpoints

    rows = run_checkpoints(run, verify=verify)
    columns = ["model", "step", "mebibytes", "kept_as", "path", *(["state", "gib_per_second"] if verify else [])]
    if json:
        print_json(rows)
    elif rows:
        names = {"mebibytes": "MiB", "kept_as": "kept as", "gib_per_second": "GiB/s"}
        print_table(rows, columns, [names.get(column, column) for column in columns])
    else:
        print(f"{run} holds no checkpoint: it finished, or was not trained for train.checkpoint_every steps")
    return int(any(row.get("state", "whole") != "whole" for row in rows))
