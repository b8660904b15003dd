"""`moestro replay`: run a step that failed, alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from moestro.cli.terminal import print_json

app = App(
    name="replay",
    help_epilogue="""\
Examples:
  moestro replay runs/first-seed0/repro""",
)


@app.default
def replay(repro: Path, /, *, json: Annotated[bool, Parameter(negative=())] = False) -> int:
    """Run a step that met a bad number once more, alone.

    Exit code 1 if it fails again, 0 if the step is finite on this machine.

    Args:
        repro: folder `repro/` that a run wrote beside its other files when a step failed.
        json: print the answer for machines.
    """
    from moestro.train import replay_step

    answer = replay_step(repro)
    if json:
        print_json(answer)
    else:
        print(f"then: {answer['before']}")
        print(f"now: {answer['now']}" if answer["now"] else f"now: finite, loss {answer['loss']:.4f}")
    return int(answer["now"] is not None)
