"""What the pages of this room share: templates, style, script, and writing a page beside its numbers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moestro.inspect.pictures import plotly_script

_TEMPLATE = Path(__file__).parent / "template"


def render(template: str, **values: Any) -> str:
    """A page from a template, with style and scripts inside, so that it loads nothing.

    Raises:
        ModuleNotFoundError: plotly is not installed.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        style=Markup((_TEMPLATE / "report.css").read_text(encoding="utf-8")),
        script=Markup((_TEMPLATE / "report.js").read_text(encoding="utf-8")),
        plotly=Markup(plotly_script()),
        **values,
    )


def write_with_numbers(content: str, found: Mapping[str, Any], page: Path) -> tuple[Path, Path]:
    """Write a page and, beside it, its numbers as JSON; both or, where one fails, neither.

    Args:
        content: of the page.
        found: its numbers.
        page: an .html path.

    Returns: the page and the JSON file.
    """
    numbers = page.with_suffix(".json")
    page.parent.mkdir(parents=True, exist_ok=True)
    write_whole({page: content, numbers: json.dumps(found, ensure_ascii=False)})
    return page, numbers


def write_whole(contents: Mapping[Path, str]) -> None:
    """Write files of text: all of them or, where one fails, none."""
    drafts = {path: path.with_name(f"{path.name}.tmp") for path in contents}
    try:
        for path, text in contents.items():
            drafts[path].write_text(text, encoding="utf-8")
        for path, draft in drafts.items():
            os.replace(draft, path)
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)


TILE = ("label", "value", "unit", "note", "tone")
Tile = tuple[str, str, str, str, str]


def tiles_of(rows: Sequence[Tile]) -> list[dict[str, str]]:
    """The numbers at the head of a page, for the template; a tone is good, bad or none."""
    return [dict(zip(TILE, row, strict=True)) for row in rows]


def in_words(number: int) -> str:
    """A whole number with its thousands apart."""
    return f"{number:,}".replace(",", " ")


def folder_name(folder: Path) -> str:
    """Of the folder, or of the run that keeps its model in `model/`."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "model" else folder.name
