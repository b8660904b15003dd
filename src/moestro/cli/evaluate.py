"""`moestro eval`: measure a trained model in bits per byte of a text."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from moestro.cli.flags import Whole, WholeOrNone
from moestro.cli.folders import model_folder
from moestro.cli.terminal import print_json, print_table

if TYPE_CHECKING:
    from moestro.inference import Evaluation

app = App(
    name="eval",
    help_epilogue="""\
Examples:
  moestro eval runs/first-seed0 --data README.md
  moestro eval runs/first-seed0/model --data notes/ 'books/*.txt' --json""",
)
COLUMNS = ("bits_per_byte", "loss", "perplexity", "accuracy", "num_tokens", "num_bytes", "sequence_length")
LENGTH = 256  # where the recipe of the model is not known


@app.default
def evaluate(
    model: Path,
    /,
    *,
    data: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())],
    sequence_length: WholeOrNone = None,
    batch_size: Whole = 16,
    device: str = "auto",
    json: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
) -> None:
    """Measure a trained model in bits per byte of a text.

    Args:
        model: a model folder, or the folder of a run.
        data: files, folders or globs.
        sequence_length: tokens that the model sees at once [default: as it was trained].
        batch_size: sequences at once.
        device: auto, cpu, cuda or cuda:N.
        json: print the numbers for machines.
    """
    folder = model_folder(model)
    length = sequence_length or trained_length(folder) or LENGTH
    found = evaluate_text(folder, data, length=length, batch_size=batch_size, device=device)
    facts = {**dataclasses.asdict(found), "perplexity": found.perplexity, "sequence_length": length}
    print_json(facts) if json else print_table([facts], COLUMNS)


def evaluate_text(
    folder: Path, paths: Sequence[str], *, length: int, batch_size: int = 16, device: str = "auto"
) -> Evaluation:
    """Predict every token of some text, in windows of `length` tokens.

    Args:
        folder: of the model and its tokenizer.
        paths: files, folders or globs.
        length: tokens in a window.
        batch_size: windows at once.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        ValueError: no such model or text, or less than two tokens of it.
    """
    from moestro.data import Batches, open_tokenizer, read_documents, write_tokens
    from moestro.inference import evaluate
    from moestro.models import load_model
    from moestro.train.machine import choose_machine

    tokenizer = open_tokenizer(folder)
    documents = list(read_documents(paths))
    encoded = tokenizer.encode_documents(documents)
    rows = ((ids, 0, len(document.data)) for ids, document in zip(encoded, documents, strict=True))
    with tempfile.TemporaryDirectory() as temporary:
        file = write_tokens(Path(temporary) / "text.tokens", rows, tokenizer.piece_bytes)
        batches = Batches(file, batch_size, length, shuffle=False)
        return evaluate(load_model(folder).to(choose_machine(device).device), batches)


def trained_length(folder: Path) -> int | None:
    """The sequence length of the run that a model folder lies in, if it lies in one."""
    from moestro.train import load_recipe

    recipe = folder.parent / "recipe.yaml"
    return load_recipe(recipe).data.sequence_length if recipe.is_file() else None
