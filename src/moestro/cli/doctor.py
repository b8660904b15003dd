"""`moestro doctor`: known defects that training a transformers model would meet, and what mends each."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from rich.text import Text

from moestro.cli.flags import Whole
from moestro.cli.folders import model_folder
from moestro.cli.terminal import console, print_json

app = App(
    name="doctor",
    help_epilogue="""\
Examples:
  moestro doctor path/to/olmoe
  moestro doctor path/to/deepseek-v3 --json
  moestro doctor path/to/switch-base-8 --accumulation 4

No weight is read, so the size of the model does not matter.""",
)


@app.default
def doctor(
    model: Path,
    /,
    *,
    accumulation: Whole = 1,
    json: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
) -> int:
    """Say which known defects training a transformers model would meet.

    Each comes with the line that mends it. No weight is read.

    Exit code 0 if none was found, 1 otherwise.

    Args:
        model: folder with the config.json of a transformers MoE model.
        accumulation: micro-batches of an optimiser step in the training that is planned.
        json: print the findings for machines.
    """
    from moestro.hf.doctor import diagnose_folder

    findings = diagnose_folder(model_folder(model), accumulation=accumulation)
    if json:
        print_json([dataclasses.asdict(finding) for finding in findings])
        return int(bool(findings))
    out = console()
    for finding in findings:
        place = finding.layers[0] if len(finding.layers) == 1 else f"{len(finding.layers)} layers"
        out.print(Text.assemble((finding.name, "bold red"), f"  {finding.what}  ", (f"({place})", "dim")))
        out.print(Text.assemble("  mend: ", (finding.mend, "cyan")))
    if not findings:
        out.print("no known defect found")
    return int(bool(findings))
