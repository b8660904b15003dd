"""From the folders of a study's runs to the one table: study.json; imports no torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from moestro.study.intervals import interval, least_significant_difference
from moestro.study.plan import Job, Row
from moestro.study.recipe import DENSE
from moestro.train.files import read_lines

GRADIENT_FLOOR = 1e-10
"""A router whose gradient norm stays below this is dead."""

Values = dict[int, float]


def collect_rows(
    rows: Sequence[Row], jobs: Sequence[Job], speeds: Mapping[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """One mapping per row of the study, best first, failed and unfinished ones last.

    `bits_per_byte` and `difference` (to the dense model, seed by seed) are `{mean, half_width}` of 95 % intervals;
    `within_noise` lists the ranks of all rows from which the paired difference is not told apart from zero.
    """
    found = [_row(row, [job for job in jobs if job.row is row], speeds.get(row.label)) for row in rows]
    found.sort(key=lambda row: row["bits_per_byte"]["mean"] if row["bits_per_byte"] else math.inf)
    dense = next((_values(row) for row in found if row["label"] == DENSE), {})
    for rank, row in enumerate(found, 1):
        row["rank"] = rank if row["bits_per_byte"] else None
        row["difference"] = None if row["label"] == DENSE else _difference(_values(row), dense)
    for row in found:
        row["within_noise"] = _alike(row, found) if row["rank"] else []
    return found


def noise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The least significant difference, of the rows that have every seed, or else of those that have most.

    `seeds` and `methods` say how many; None while no two rows have two seeds in common.
    """
    tables = [_values(row) for row in rows]
    for count in range(max((len(table) for table in tables), default=0), 1, -1):
        seeds = max((sorted(table) for table in tables if len(table) == count), default=[])
        common = [[table[seed] for seed in seeds] for table in tables if table.keys() >= set(seeds)]
        found = least_significant_difference(common)
        if found is not None:
            return {"least_significant_difference": found, "seeds": count, "methods": len(common)}
    return None


def _row(row: Row, jobs: Sequence[Job], speed: dict[str, Any] | None) -> dict[str, Any]:
    runs = [_run(job) for job in jobs if job.settled]
    done = [run for run in runs if not run["problem"]]
    bits = [run["bits_per_byte"] for run in done]
    sizes = row.match
    return {
        "label": row.label,
        "method": row.method,
        "options": row.options,
        "num_experts": sizes.model.num_experts if sizes and row.method else None,
        "expert_hidden": sizes.model.expert_hidden if sizes and row.method else None,
        "active_parameters": sizes.active if sizes else None,
        "total_parameters": sizes.total if sizes else None,
        "active_off": sizes.off if sizes else None,
        "note": sizes.note if sizes else "",
        "problem": row.problem,
        "bits_per_byte": _interval(bits) if bits else None,
        "speed": speed,
        "runs": runs,
        **_means(done),
        "flags": _flags(row, runs),
        "curve": _curve(jobs),
    }


def _run(job: Job) -> dict[str, Any]:
    result = job.result
    if result is None:
        return {"seed": job.seed, "problem": job.problem}
    return {
        "seed": job.seed,
        "problem": "",
        "bits_per_byte": result["validation_bits_per_byte"],
        "seconds": result["seconds"],
        "dead_experts": result.get("dead_experts"),
        **_routing(job),
    }


def _routing(job: Job) -> dict[str, Any]:
    """Statistics of the last tenth of the routing records, averaged over layers.

    The load is averaged over those records first: what remains of its variation is not the luck of one batch.
    """
    records = read_lines(job.folder / "routing.jsonl")
    if not records:
        return {}
    last = records[-max(1, len(records) // 10) :]
    layers = [[record["layers"][i] for record in last] for i in range(len(last[0]["layers"]))]
    loads = [
        [statistics.fmean(share) for share in zip(*(at["load"] for at in layer), strict=True)] for layer in layers
    ]
    entropies = [_mean([at["entropy"] for at in layer]) for layer in layers]
    return {
        "load_cv": statistics.fmean(statistics.pstdev(load) / statistics.fmean(load) for load in loads),
        "entropy": _mean([_share(value, len(load)) for value, load in zip(entropies, loads, strict=True)]),
        "dropped": _mean([at["dropped"] for layer in layers for at in layer]),
        "router_grad_norm": _mean([at.get("router_grad_norm") for layer in layers for at in layer]),
        "dead_router": _dead_router(records),
        "starved": max(_starved(load) for load in loads),
    }


def _share(entropy: float | None, num_experts: int) -> float | None:
    """Entropy over that of a router without any preference."""
    return None if entropy is None or num_experts < 2 else entropy / math.log(num_experts)


def _starved(load: Sequence[float]) -> float:
    """Share of the experts that get less than a tenth of what an even load would give them."""
    return sum(share < 0.1 / len(load) for share in load) / len(load)


def _dead_router(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a router that has a gradient never had one above the floor, or lost it before the end."""
    for i in range(len(records[0]["layers"])):
        norms = [record["layers"][i].get("router_grad_norm") for record in records]
        known = [norm for norm in norms if norm is not None]
        if known and max(known[-max(1, len(known) // 10) :]) < GRADIENT_FLOOR:
            return True
    return False


def _means(runs: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    names = ("load_cv", "entropy", "dropped", "router_grad_norm", "dead_experts", "seconds")
    return {name: _mean([run.get(name) for run in runs]) for name in names}


def _flags(row: Row, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader must know about a row before trusting its number."""
    flags = []
    failed = sum(1 for run in runs if run["problem"])
    if failed:
        flags.append(f"failed with {failed} of {len(runs)} seeds")
    if any(run.get("dead_router") for run in runs):
        flags.append("dead router")
    if any((run.get("starved") or 0) >= 0.5 for run in runs):
        flags.append("collapsed")
    if row.match is not None and row.match.note:
        flags.append("other active size")
    return flags


def _curve(jobs: Sequence[Job]) -> dict[str, list[float]]:
    """Validation bits per byte over the steps, averaged over the seeds that have reached each."""
    by_step: dict[int, list[float]] = {}
    for job in jobs:
        for record in read_lines(job.folder / "evaluations.jsonl") if job.result else []:
            by_step.setdefault(record["step"], []).append(record["bits_per_byte"])
    steps = sorted(by_step)
    return {"steps": list(steps), "bits_per_byte": [statistics.fmean(by_step[step]) for step in steps]}


def _values(row: Mapping[str, Any]) -> Values:
    return {run["seed"]: run["bits_per_byte"] for run in row["runs"] if not run["problem"]}


def _difference(ours: Values, theirs: Values) -> dict[str, Any] | None:
    """Ours minus theirs, paired by seed."""
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        return None
    found = interval([ours[seed] - theirs[seed] for seed in common])
    return {"mean": found.mean, "half_width": found.half_width, "within_noise": found.holds_zero}


def _alike(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Ranks of the other rows from which this one cannot be told apart."""
    others = [other for other in rows if other["rank"] and other is not row]
    differences = ((other["rank"], _difference(_values(row), _values(other))) for other in others)
    return [rank for rank, difference in differences if difference and difference["within_noise"]]


def _interval(values: Sequence[float]) -> dict[str, Any]:
    found = interval(values)
    return {"mean": found.mean, "half_width": found.half_width, "seeds": len(values)}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
