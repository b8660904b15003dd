"""`moestro placement`: what placing a run's experts by their load would gain."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from moestro.cli.terminal import print_json, print_table

app = App(
    name="placement",
    help_epilogue="""\
Examples:
  moestro placement runs/first-seed0 --ranks 4
  moestro placement runs/first-seed0 --ranks 4 --slots 20 --picture load.png""",
)


@app.default
def placement(
    run: Path,
    /,
    *,
    ranks: int | None = None,
    slots: int | None = None,
    nodes: int = 1,
    groups: int = 1,
    predictor: str = "sliding-average",
    decide_at: float = 0.5,
    picture: Path | None = None,
    policy: str = "refined",
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Say what placing a run's experts by their load would gain.

    Each policy sees the first part of the recorded loads, decides once, and is measured on the rest.

    Args:
        run: folder of a run.
        ranks: processes over which experts would be spread; always needed.
        slots: physical experts on all ranks, for replicas [default: one for each expert].
        nodes: machines with equal numbers of ranks.
        groups: equal groups of consecutive experts, for node-limited routing.
        predictor: of loads: last, sliding-average, exponential-average, autoregression, arima or lstm.
        decide_at: share of the records after which placements are decided.
        picture: draw the load of each rank before and after --policy to this file (.png, .svg or .pdf).
        policy: the one to draw.
        json: print every layer and placement for machines.
    """
    from moestro.inspect.placement import run_placements
    from moestro.inspect.placement_picture import draw_placements
    from moestro.inspect.runfolder import read_run
    from moestro.parallel import Cluster

    if ranks is None:
        read_run(run)  # a folder that is no run comes first
        raise ValueError(f"say over how many processes: moestro placement {run} --ranks 4")
    found = run_placements(run, Cluster(ranks, slots, nodes, groups), predictor=predictor, decide_at=decide_at)
    if picture is not None:
        draw_placements(found, policy, picture)
    if json:
        print_json(found.plain())
        return
    first, last = found.steps
    print(f"measured on steps {first} to {last}, which no policy had seen; {len(found.layers)} layers")
    columns = ("policy", "slots", "balancedness", "hindsight", "speedup", "moved")
    rows = [
        row | {name: f"{row[name]:.3f}" for name in ("balancedness", "hindsight", "speedup")}
        for row in found.summary()
    ]
    print_table(rows, columns, ("policy", "slots", "mean / max load", "in hindsight", "speed-up", "experts moved"))
    if picture is not None:
        print(picture)
