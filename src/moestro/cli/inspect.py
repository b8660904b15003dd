"""`moestro inspect`: what the experts of a model do on a text, as a page and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from moestro.cli.flags import Whole
from moestro.cli.folders import model_folder
from moestro.cli.pages import check_page, show_page, show_progress

app = App(
    name="inspect",
    help_epilogue="""\
Examples:
  moestro inspect path/to/olmoe
  moestro inspect path/to/mixtral --data notes.txt --out notes.html
  moestro inspect runs/first-seed0 --json""",
)
DEFAULT = "default"
COLUMNS = ("layer", "experts", "busiest", "never", "dead", "entropy", "gap", "ties", "top_90", "next", "outputs")


@app.default
def inspect(
    model: Path,
    /,
    *,
    data: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())] = (),
    corpus: str | None = None,
    out: Path = Path("report.html"),
    tokens: Whole = 16384,
    sequence_length: Whole = 256,
    batch_size: Whole = 8,
    json: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
) -> None:
    """Run a model over a text and show what its experts do.

    Writes a page and, beside it, the same numbers as JSON.

    Args:
        model: a transformers MoE model folder, a folder that moestro saved, or a run.
        data: files, folders or globs [default: the default corpus].
        corpus: a corpus by name; there is one, default: Python's own sources and manuals.
        out: the page; the numbers go to the same name with .json.
        tokens: of the text, at most; excerpts are spread evenly over its domains.
        sequence_length: tokens that the model sees at once.
        batch_size: sequences at once.
        json: print the numbers instead of writing anything.
    """
    if corpus not in (None, DEFAULT):
        raise ValueError(f"there is no corpus {corpus!r}; pass --corpus default, or --data and your own files")
    if corpus and data:
        raise ValueError("--corpus and --data both name a text; pass one of them")
    check_page(out, "report.html")
    found = inspect_folder(
        model_folder(model),
        data,
        tokens=tokens,
        length=sequence_length,
        batch_size=batch_size,
        progress=show_progress(),
    )
    from moestro.inspect.model_page import write_model_page

    show_page(found, None if json else out, write_model_page, _row, COLUMNS)


def inspect_folder(
    folder: Path,
    paths: Sequence[str] = (),
    *,
    tokens: int = 16384,
    length: int = 256,
    batch_size: int = 8,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Run the model of a folder over excerpts of a text and say what its experts do.

    Args:
        folder: of the model and its tokenizer.
        paths: files, folders or globs; none = the default corpus.
        tokens: of the text, at most.
        length: tokens that the model sees at once.
        batch_size: sequences at once.
        progress: called with a few words now and then.

    Returns: `model`, `text` and what `moestro.inspect.Survey.result` returns.

    Raises:
        ValueError: no such model or text, a dense model, or one larger than the free memory.
    """
    from moestro.data import read_documents
    from moestro.data.excerpts import sample_excerpts
    from moestro.hf.pieces import StockTokenizer
    from moestro.hf.subject import open_subject
    from moestro.hf.windows import RankedTokenizer, cut_windows
    from moestro.inspect.survey import Survey

    tokenizer = StockTokenizer(folder)
    excerpts = sample_excerpts(read_documents(paths or None), max(tokens // length, 1), 8 * length)
    progress("loading the model")
    subject = open_subject(folder)
    length = min(length, subject.max_length or length)
    windows = cut_windows(excerpts, tokenizer, length, subject.vocab_size)
    survey, done = Survey(subject.layers, len(windows.domains), len(windows.ids)), 0
    for batch, valid, counted, domain in windows.batches(batch_size):
        survey.add(subject.route(batch, valid, counted), windows.rank(batch), domain)
        done += len(batch)
        progress(f"{done} of {len(windows.tokens)} sequences")
    for number, layer in enumerate(subject.layers, 1):
        progress(f"experts of layer {number} of {len(subject.layers)}")
        survey.add_weights(layer, subject.weights(layer))
        survey.add_outputs(layer, subject.answers(layer))
    counts = windows.counted.sum(1).double()
    return {
        "model": {"folder": str(folder)} | subject.facts(),
        "text": {
            "source": list(paths) or DEFAULT,
            "sequences": len(windows.tokens),
            "sequence_length": length,
            "tokens": int(counts.sum()),
            "tokens_by_domain": {
                name: int(counts[windows.domain == number].sum()) for number, name in enumerate(windows.domains)
            },
        },
    } | survey.result(windows.domains, RankedTokenizer(windows, tokenizer))


def _row(layer: dict[str, Any]) -> dict[str, Any]:
    following, alike = layer["next_layer"], layer["similarity_of_outputs"]
    return {
        "layer": layer["label"],
        "experts": layer["num_experts"],
        "busiest": f"{max(layer['load']) * layer['num_experts']:.2f}x fair",
        "never": len(layer["never"]),
        "dead": len(layer["dead"]),
        "entropy": layer["entropy"],
        "gap": layer["gap"] and layer["gap"]["mean"],
        "ties": layer["tie_rate"],
        "top_90": layer["experts_for_90"],
        "next": following and f"{100 * following['recall']:.0f} %",
        "outputs": alike and alike["mean"],
    }
