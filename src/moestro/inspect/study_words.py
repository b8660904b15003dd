"""A row of study.json in words: the same in the terminal, on the page and in the documentation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def interval(value: Mapping[str, Any] | None, signed: bool = False) -> str:
    """`2.759 ± 0.012`, or a dash."""
    if value is None:
        return "-"
    mean = f"{value['mean']:+.3f}" if signed else f"{value['mean']:.3f}"
    return mean if value["half_width"] is None else f"{mean} ± {value['half_width']:.3f}"


def difference(row: Mapping[str, Any]) -> str:
    """The paired difference to the dense model, with `≈` where it is within noise."""
    found = row["difference"]
    if found is None:
        return "-"
    return interval(found, signed=True) + {True: " ≈", None: " ?", False: ""}[found["within_noise"]]


def remarks(row: Mapping[str, Any]) -> str:
    """What a reader must know before trusting the row; empty when there is nothing."""
    problems = [run["problem"] for run in row["runs"] if run["problem"]]
    words = [*row["flags"], row["note"], row["problem"], *dict.fromkeys(problems)]
    return "; ".join(word for word in words if word)


def noise(study: Mapping[str, Any]) -> str:
    """The least significant difference in a sentence; empty where there is none."""
    found = study["noise"]
    if found is None:
        return ""
    return (
        f"Least significant difference between two rows, pooled over {found['methods']} rows with {found['seeds']} "
        f"seeds: {found['least_significant_difference']:.3f} bits per byte."
    )


def alike(row: Mapping[str, Any]) -> str:
    """The ranks within noise: `2-5, 9`, `-` for none, `?` where one seed cannot tell."""
    seeds = row["bits_per_byte"]["seeds"] if row["bits_per_byte"] else 0
    return "?" if seeds == 1 else ranks(row["within_noise"]) or "-"


def ranks(numbers: Iterable[int]) -> str:
    """`2-5, 9` for 2, 3, 4, 5, 9."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{low}" if low == high else f"{low}-{high}" for low, high in runs)
