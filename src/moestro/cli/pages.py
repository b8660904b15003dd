"""How commands that write a page show what they found: as JSON, or as a table, sentences and the page."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moestro.cli.terminal import print_json, print_table


def check_page(out: Path, example: str) -> None:
    """Refuse a page that is none before anything long begins."""
    if out.suffix != ".html":
        raise ValueError(f"--out {out} is no .html file; pass for example --out {example}")


def show_page(
    found: Mapping[str, Any],
    out: Path | None,
    write: Callable[[Mapping[str, Any], Path], tuple[Path, Path]],
    row: Callable[[dict[str, Any]], dict[str, Any]],
    columns: Sequence[str],
) -> None:
    """Print what was found.

    Args:
        found: with its layers and findings.
        out: the page; None = print JSON and write nothing.
        write: the page and its numbers.
        row: of the table, of a layer.
        columns: of the table; those that no layer fills are left out.
    """
    if out is None:
        print_json(found)
        return
    paths = write(found, out)
    rows = [row(layer) for layer in found["layers"]]
    print_table(rows, [column for column in columns if any(each[column] is not None for each in rows)])
    for line in (*found["findings"], *paths):
        print(line)


def show_progress() -> Callable[[str], None]:
    """Writes over one line of a terminal; silent elsewhere."""
    if not sys.stderr.isatty():
        return lambda text: None
    return lambda text: print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
