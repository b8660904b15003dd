"""How results are printed: tables for people, JSON for machines, plain text into pipes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPE_WIDTH = 1000  # a pipe has no edge to wrap at


def console(file: IO[str] | None = None) -> Console:
    """A console on stdout: colours on a terminal (unless NO_COLOR), plain unwrapped lines elsewhere."""
    file = sys.stdout if file is None else file
    wide = not file.isatty() and "COLUMNS" not in os.environ
    return Console(file=file, width=PIPE_WIDTH if wide else None, highlight=False, markup=False, emoji=False)


def print_json(value: Any) -> None:
    """Print a value as indented JSON, exactly and without colours."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_table(
    rows: Iterable[Mapping[str, Any]],
    columns: Sequence[str],
    headers: Sequence[str] | None = None,
    *,
    one_line: bool = False,
) -> None:
    """Print rows as an aligned table without lines; columns of numbers are aligned at the right.

    Args:
        rows: one mapping per row; values are shown with `show`.
        columns: the keys to print, in order.
        headers: their names [default: the keys, `_` as a space].
        one_line: on a narrow terminal, cut the last column instead of wrapping.
    """
    names = [header.replace("_", " ") for header in headers or columns]
    cells = [[show(row.get(column)) for column in columns] for row in rows]
    out, table = console(), Table(box=None, pad_edge=False, header_style="bold")
    if one_line:
        _cut(names, cells, out.width)
    for name, values in zip(names, zip(*cells, strict=True), strict=True):
        numbers = all(value == "-" or value[:1].isdigit() for value in values)
        table.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    out.print(table)


def _cut(names: list[str], cells: list[list[str]], width: int) -> None:
    """Shorten the last cell of each row to what the others leave, in place."""
    others = [max(map(len, column)) + 2 for column in zip(names, *cells, strict=True)][:-1]
    left = max(width - sum(others), len(names[-1]))
    for row in cells:
        row[-1] = row[-1] if len(row[-1]) <= left else f"{row[-1][: left - 1]}…"


def show(value: Any) -> str:
    """A value as people read it: `1 234 567`, `1.852`, `yes`."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace(",", " ")
    if isinstance(value, float):
        return f"{value:,.0f}".replace(",", " ") if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def size(num_bytes: float) -> str:
    """Bytes as people read them: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def duration(seconds: float | None) -> str:
    """Seconds as people read them: `45 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds is None:
        return "-"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    large, small, names = (*divmod(seconds, 60), ("min", "s"))
    if seconds >= 3600:
        large, small, names = (*divmod(seconds // 60, 60), ("h", "min"))
    return f"{large} {names[0]} {small} {names[1]}"
