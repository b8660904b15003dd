"""`moestro quantise`: write a model whose weights are 8-bit or 4-bit codes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from moestro.cli.flags import Whole
from moestro.cli.folders import model_folder
from moestro.cli.terminal import print_json, print_table, size

app = App(
    name="quantise",
    help_epilogue="""\
Examples:
  moestro quantise runs/first-seed0 first-8bit --bits 8
  moestro quantise runs/first-seed0/model first-4bit --bits 4 --group 32
  moestro quantise runs/first-seed0 first-4bit --bits 4 --keep head.weight""",
)


@app.default
def quantise(
    model: Path,
    target: Path,
    /,
    *,
    bits: Whole,
    group: Whole = 64,
    keep: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())] = (),
    json: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
) -> None:
    """Write a model whose weights are 8-bit or 4-bit codes.

    The error of every tensor is printed. Experts, dense networks, attention and head are quantised; norms, routers
    and embeddings stay as they are. The folder opens with `moestro generate`, `eval` and `inspect`, not with
    stock transformers.

    Args:
        model: a model folder, or the folder of a run.
        target: a folder that does not exist yet.
        bits: 8 or 4.
        group: inputs that share a scale in 4 bits: 32, 64, 128 or 256.
        keep: patterns of more tensors to leave as they are, for example '*.attention.*'.
        json: print the errors for machines.
    """
    from moestro.data import open_tokenizer
    from moestro.inference.quantise import KEPT, quantise_model
    from moestro.models import load_model, save_model

    if target.exists():
        raise ValueError(f"{target} exists; choose a folder that does not exist yet, or remove it")
    source = model_folder(model)
    tokenizer = open_tokenizer(source) if (source / "tokenizer.json").is_file() else None
    loaded = load_model(source)
    errors = quantise_model(loaded, bits, group, keep=(*KEPT, *keep))
    saved = save_model(loaded, target, tokenizer)
    before, after = _weights(source), _weights(saved.folder)
    rows = [dataclasses.asdict(error) for error in errors]
    if json:
        print_json({"path": str(target), "bytes_before": before, "bytes": after, "tensors": rows})
        return
    print_table(rows, ("name", "bits", "error", "worst"))
    worst = max(errors, key=lambda error: error.error)
    print(
        f"{target}: {len(errors)} tensors in {bits} bits, {size(before)} became {size(after)}; "
        f"{worst.name} lost most, {worst.error:.4f} of its norm"
    )


def _weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
