"""Finished studies as one page of documentation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moestro.inspect.study_words import alike, difference, interval, noise, remarks

_HEADER = """\
# Leaderboard

Methods at equal active parameters, equal tokens and equal seeds, made by `moestro study` and written by
`moestro leaderboard`. A study says how methods compare **at its own size**: read the differences, not the digits.

- **bits per byte** of validation text, mean over the seeds with its 95 % interval (Student's t).
- **against dense**: minus the dense model of equal active parameters, seed by seed, with the 95 % interval; `≈`
  marks what these seeds cannot tell from zero, `?` what has one seed only.
- **least significant difference**: two rows that differ by more are told apart by all rows' noise taken together
  (Fisher's, methods and seeds as blocks); with few seeds it sees more than the interval of a single row.
- **like ranks**: the rows from which the paired difference cannot be told apart.
- **speed**: tokens per second in training over those of the dense model, measured in turns, one process at a time.
- **load CV**, **dropped**, **entropy** (1 = undecided) and **router gradient** (norm) are of the last tenth of
  the training; **dead** experts are counted on the validation text, in all layers, averaged over seeds.
- **collapsed**: half of the experts of a layer, or more, get less than a tenth of an even load. **dead router**:
  its gradient vanished. **failed**: a training ended with an error.
"""
_COLUMNS = (
    "rank",
    "method",
    "bits per byte",
    "against dense",
    "like ranks",
    "speed",
    "load CV",
    "dropped",
    "dead",
    "entropy",
    "router gradient",
    "experts × hidden",
    "total parameters",
    "remarks",
)


def leaderboard(studies: Sequence[Path]) -> str:
    """The page of some `study.json` files, or of the folders that hold them.

    Raises:
        ValueError: a folder without a study, or a file that is none.
    """
    return "\n".join([_HEADER, *(_section(_read(path)) for path in studies)])


def _read(path: Path) -> dict[str, Any]:
    file = path / "study.json" if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} holds no study; pass a folder that `moestro study` wrote") from None
    except ValueError:
        found = None
    if not isinstance(found, dict) or "rows" not in found:
        raise ValueError(f"{file} is not the result of a study; pass a folder that `moestro study` wrote")
    return found


def _section(study: Mapping[str, Any]) -> str:
    lines = [f"## {study['name']}", "", _about(study), ""]
    lines += [_line(_COLUMNS), _line(["---"] * len(_COLUMNS))]
    lines += [_line(_cells(row)) for row in study["rows"]]
    return "\n".join([*lines, "", f"```yaml\n{study['recipe'].strip()}\n```", ""])


def _about(study: Mapping[str, Any]) -> str:
    machine = study["machine"]
    tokens = f"{study['tokens']:,}".replace(",", " ")
    dense = next((row for row in study["rows"] if row["method"] is None), None)
    active = f"{dense['active_parameters']:,} active parameters, ".replace(",", " ") if dense else ""
    unfinished = (
        ""
        if study["settled"] == study["trainings"]
        else (f" **Not finished: {study['settled']} of {study['trainings']} trainings have ended.**")
    )
    speeds = sorted({row["speed"].get("commit") or "unknown" for row in study["rows"] if row["speed"]})
    measured = f" Speeds at commit {', '.join(speeds)}." if speeds else ""
    return (
        f"{study['date']}, commit {study['commit'] or 'unknown'}, {machine['processor']} with {machine['cores']} "
        f"cores, {study['threads']} thread(s) per training, {study['precision']}, torch "
        f"{study['versions'].get('torch')}; {active}{tokens} tokens per training, seeds "
        f"{', '.join(map(str, study['seeds']))}.{measured} {noise(study)}{unfinished}"
    )


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        str(row["rank"] or "-"),
        row["label"] if row["method"] else f"**{row['label']}**",
        interval(row["bits_per_byte"]),
        difference(row),
        alike(row),
        _number(row["speed"] and row["speed"]["relative"], ".2f"),
        _number(row["load_cv"], ".2f"),
        _number(row["dropped"], ".1%"),
        _number(row["dead_experts"], ".1f"),
        _number(row["entropy"], ".2f"),
        _number(row["router_grad_norm"], ".1e"),
        f"{row['num_experts']} × {row['expert_hidden']}" if row["num_experts"] else "-",
        f"{row['total_parameters']:,}".replace(",", " ") if row["total_parameters"] else "-",
        remarks(row) or "",
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
