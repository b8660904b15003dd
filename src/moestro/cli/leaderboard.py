"""`moestro leaderboard`: the table of finished studies as a page of documentation."""

from __future__ import annotations

from pathlib import Path

from cyclopts import App

app = App(
    name="leaderboard",
    help_epilogue="""\
Examples:
  moestro leaderboard runs/study > docs/leaderboard.md
  moestro leaderboard runs/study runs/study-first""",
)


@app.default
def leaderboard(study: Path, /, *more: Path) -> None:
    """Print the table of finished studies as a page of documentation.

    Args:
        study: folder that `moestro study` wrote, or its study.json.
        more: further ones.
    """
    from moestro.inspect.leaderboard import leaderboard as page

    print(page([study, *more]), end="")
