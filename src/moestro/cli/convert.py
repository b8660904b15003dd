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
  moestro convert runs/four/checkpoint/step-00000100 four-hf
  moestro convert first.gguf first-again --to transformers
  moestro convert merged-by-mergekit stock --to transformers""",
)


@app.default
def convert(
    source: Path,
    target: Path,
    /,
    *,
    to: str | None = None,
    dtype: str | None = None,
    max_shard_size: Whole = 5_000_000_000,
    json: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
) -> None:
    """Write a model in another layout.

    One expert is in memory at a time, and weights keep every bit, except in GGUF types that round. The source is
    checked before anything is written and the target appears whole or not at all.

    Args:
        source: a model folder of transformers or moestro, a GGUF file, a run of `moestro train`, whose newest
            checkpoint is taken, or a checkpoint, saved by any number of processes.
        target: a folder, or with `--to gguf` a file, that does not exist yet.
        to: transformers, fused, mergekit, gguf or moestro; also per-expert, w1w2w3, transposed, interleaved. A
            checkpoint becomes transformers or moestro [default, of a checkpoint only: transformers if a stock
            architecture computes exactly this model, else moestro].
        dtype: only with `--to gguf`: F32, F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1 or Q4_0 [default: that of the model].
        max_shard_size: bytes of one file of a folder.
        json: print what was done for machines.
    """
    import dataclasses

    from moestro.hf.convert import convert as convert_model
    from moestro.hf.from_training import write_trained
    from moestro.train.checkpoint_model import CheckpointModel, is_checkpoint_or_run

    with _Bar() as bar:
        if is_checkpoint_or_run(source):
            if dtype is not None:
                raise ValueError(
                    f"dtype={dtype} has no meaning for a folder, which keeps the bits it has; leave it out"
                )
            trained = CheckpointModel(source)
            done = write_trained(trained, target, to, max_shard_size=max_shard_size, progress=bar.show)
        elif to is None:
            raise ValueError("say what to convert the model to, for example --to transformers")
        else:
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
