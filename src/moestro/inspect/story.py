"""The words and numbers of a report: headline, verdict, facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moestro.inspect.runfolder import RunFolder, number, series

_BITS = ("validation_bits_per_byte", "bits_per_byte")
_SPEED = ("tokens_per_second", "throughput")
_TOTAL = ("total_parameters", "parameters.total", "parameters")
_ACTIVE = ("active_parameters", "parameters.active")


@dataclass(frozen=True)
class Tile:
    """One number of the headline."""

    label: str
    value: str
    unit: str
    note: str
    tone: str = ""


def find(values: Mapping[str, Any], *paths: str) -> Any:
    """The first value present under one of the dotted paths."""
    for path in paths:
        value: Any = values
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            return value
    return None


def bits_per_byte(run: RunFolder, step: int | None = None) -> float | None:
    """Validation bits per byte: as measured at a step, else of the result, else the last one measured."""
    steps, values = series(run.evaluations, "bits_per_byte")
    if step is not None:
        return dict(zip(steps, values, strict=True)).get(step)
    final = number(find(run.result, *_BITS))
    return final if final is not None else (values[-1] if values else None)


def comparison(run: RunFolder) -> tuple[float | None, float | None]:
    """Bits per byte of MoE and twin at equal steps: both final values, or the last common measurement."""
    if run.twin is None:
        return bits_per_byte(run), None
    if run.result and run.twin.result and last_step(run) == last_step(run.twin):
        return bits_per_byte(run), bits_per_byte(run.twin)
    common = set(series(run.evaluations, "bits_per_byte")[0])
    common &= set(series(run.twin.evaluations, "bits_per_byte")[0])
    if not common:
        return bits_per_byte(run), None
    return bits_per_byte(run, max(common)), bits_per_byte(run.twin, max(common))


def last_step(run: RunFolder) -> int:
    """The last step that left any trace."""
    return max(
        (records[-1]["step"] for records in (run.metrics, run.evaluations, run.routing) if records), default=0
    )


def verdict(run: RunFolder) -> str:
    """What the run showed, in two sentences a newcomer understands."""
    moe, twin = comparison(run)
    who = "the dense model" if is_dense(run) else "the mixture of experts"
    if moe is None:
        return "No validation was measured, so nothing can be said about quality yet."
    start = (
        f"On text it has never seen, {who} needs {moe:.3f} bits for each byte (raw text takes 8; fewer is better)."
    )
    if twin is None:
        return start
    share = abs(moe - twin) / twin if twin else 0.0
    if abs(moe - twin) < 5e-4:
        return f"{start} Its dense twin, with equal active parameters and the same tokens, needs as many."
    outcome = "the experts save" if moe < twin else "the experts cost"
    return (
        f"{start} Its dense twin, with equal active parameters and the same tokens, needs {twin:.3f}: "
        f"{outcome} {abs(moe - twin):.3f} bits a byte, or {100 * share:.1f} %."
    )


def is_dense(run: RunFolder) -> bool:
    """Whether the recipe asks for no experts at all."""
    model = run.recipe.get("model")
    return isinstance(model, Mapping) and "method" in model and model["method"] is None


def tiles(run: RunFolder) -> list[Tile]:
    """The numbers of the headline; a missing one is a dash with its reason."""
    moe, twin = comparison(run)
    result, other = run.result, _twin_result(run)
    name = "dense model" if is_dense(run) else "mixture of experts"
    boxes = [Tile(name, _three(moe), "bits per byte", "validation")]
    if run.twin or not is_dense(run):
        note = _why_no_twin(run) if twin is None else "validation"
        boxes += [Tile("dense twin", _three(twin), "bits per byte", note), _difference(moe, twin)]
    speed, twin_speed = _speed(run), _speed(run.twin) if run.twin else None
    note = f"dense twin {count(twin_speed)}" if twin_speed else "in training"
    boxes.append(Tile("speed", count(speed), "tokens/s", note))
    active, total = number(find(result, *_ACTIVE)), number(find(result, *_TOTAL))
    twin_total = number(find(other, *_TOTAL))
    note = f"of {count(total)} in total" if total else "in use for one token"
    note += f"; twin {count(twin_total)}" if twin_total else ""
    boxes.append(Tile("parameters", count(active if active is not None else total), "active", note))
    return boxes


def _difference(moe: float | None, twin: float | None) -> Tile:
    if moe is None or twin is None:
        return Tile("difference", "–", "bits per byte", "needs both models")
    tone = "good" if moe < twin else "bad" if moe > twin else ""
    note = "fewer bits than the twin" if moe < twin else "more bits than the twin" if moe > twin else "even"
    return Tile("difference", f"{moe - twin:+.3f}".replace("-", "−"), "bits per byte", note, tone)


def _why_no_twin(run: RunFolder) -> str:
    if run.twin is not None:
        return "not measured at the same step"
    return "switched off in the recipe" if run.recipe.get("twin") is False else "not trained"


def _speed(run: RunFolder | None) -> float | None:
    if run is None:
        return None
    final = number(find(run.result, *_SPEED))
    values = sorted(series(run.metrics, "tokens_per_second")[1])
    return final if final is not None else (values[len(values) // 2] if values else None)


def count(value: float | None) -> str:
    """A number of things, to three digits or so: 987, 12 400, 5.61 M."""
    if value is None:
        return "–"
    for size, letter in ((1e9, " G"), (1e6, " M")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}" if value < 100 else f"{round(value):,}".replace(",", " ")


def _three(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def notices(run: RunFolder) -> list[str]:
    """What a reader must know before trusting the page: interruptions and damage."""
    asked = number(find(run.recipe, "train.steps"))
    done, found = last_step(run), []
    if asked and done < asked and run.metrics:
        found.append(f"The run stopped at step {done} of {asked:.0f}; this page shows that part.")
    elif not run.result:
        found.append("The run left no result.json: it is unfinished or was interrupted.")
    if run.twin is not None and last_step(run.twin) != done:
        found.append(
            f"The dense twin is at step {last_step(run.twin)}, the model at {done}: "
            "the headline compares them at the last step that both were evaluated at."
        )
    return [*found, *run.problems]


def facts(run: RunFolder) -> list[tuple[str, list[tuple[str, str]]]]:
    """Groups of label and value: recipe by section, then everything that result.json states."""
    groups: list[tuple[str, list[tuple[str, str]]]] = []
    plain = {key: value for key, value in run.recipe.items() if not isinstance(value, Mapping)}
    for title, section in (("Run", plain), *run.recipe.items()):
        if isinstance(section, Mapping) and section:
            groups.append((str(title).capitalize(), list(_flat(section))))
    own = {key: value for key, value in run.result.items() if key != "twin" or run.twin is None}
    if own:
        groups.append(("Result", list(_flat(own))))
    other = {key: value for key, value in _twin_result(run).items() if value != run.result.get(key)}
    if other:
        groups.append(("Dense twin, where it differs", list(_flat(other))))
    return groups


def _twin_result(run: RunFolder) -> Mapping[str, Any]:
    return run.twin.result if run.twin else {}


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        label = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            rows += _flat(value, f"{label} · ")
        else:
            rows.append((label, _shown(value)))
    return rows


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        large = 10_000 <= abs(value) < 1e15
        return (
            f"{value:,.0f}".replace(",", " ")
            if large
            else f"{value:.6g}"
            if isinstance(value, float)
            else str(value)
        )
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_shown(item) for item in value) or "none"
    return str(value)
