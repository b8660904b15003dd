"""`moestro report`: write the page that shows what the experts of a run did."""

from __future__ import annotations

from pathlib import Path

from cyclopts import App

app = App(
    name="report",
    help_epilogue="""\
Examples:
  moestro report runs/first-seed0""",
)


@app.default
def report(run: Path, /) -> None:
    """Write the page that shows what the experts of a run did.

    Args:
        run: folder of the run, finished or not.
    """
    from moestro.inspect import write_report

    print(write_report(run))
