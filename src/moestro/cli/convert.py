"""`moestro convert`: write a model in another layout."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from moestro.cli.flags import Whole
from moestro.cli.terminal import print_json, size

app = App(
    name="convert",
    help_epilogue="""\
Examples:
  moestro convert mixtral-folder mixtral-fused --to fused
  moestro convert runs/first-seed0/model first.gguf --to gguf
  moestro convert first.gguf first-again --to transformers
  moestro convert merged-by-mergekit stock --to transformers""",
)


@app.default
def convert(
    source: Path,
    target: Path,
    /,
    *,
    to: str,
    dtype: str | None = None,
    max_shard_size: Whole = 5_000_000_000,
    json: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
) -> None:
    """Write a model in another layout.

    One expert is in memory at a time, and weights keep every bit, except in GGUF types that round. The source is
    checked before anything is written and the target appears whole or not at all.

    Args:
        source: a model folder of transformers or moestro, or a GGUF file.
        target: a folder, or with `--to gguf` a file, that does not exist yet.
        to: transformers, fused, mergekit, gguf or moestro; also per-expert, w1w2w3, transposed, interleaved.
        dtype: only with `--to gguf`: F32, F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1 or Q4_0 [default: that of the model].
        max_shard_size: bytes of one file of a folder.
        json: print what was done for machines.
    """
    import dataclasses

    from moestro.hf.convert import convert as convert_model

    with _Bar() as bar:
        done = convert_model(source, target, to, dtype=dtype, max_shard_size=max_shard_size, progress=bar.show)
    if json:
        print_json(dataclasses.asdict(done) | {"path": str(done.path)})
        return
    print(
        f"{done.path}: {done.model_type} from {done.source} to {done.layout}, {done.tensors} tensors, "
        f"{size(done.nbytes)}; {done.opens} opens it"
    )


class _Bar:
    """A progress bar on a terminal that goes away at the end; nothing elsewhere."""

    def __enter__(self) -> _Bar:
        self._progress: Any = None
        return self

    def show(self, done: int, total: int) -> None:
        if self._progress is None:
            from rich.console import Console
            from rich.progress import Progress

            self._progress = Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
            self._task = self._progress.add_task("converting", total=total)
            self._progress.start()
        self._progress.update(self._task, completed=done, total=total)

    def __exit__(self, *error: object) -> None:
        if self._progress is not None:
            self._progress.stop()
