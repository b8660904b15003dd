"""`moestro diff`: what changed between two models, or two recordings of routing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from moestro.cli.flags import Whole
from moestro.cli.folders import model_folder
from moestro.cli.inspect import DEFAULT
from moestro.cli.pages import check_page, show_page, show_progress

app = App(
    name="diff",
    help_epilogue="""\
Examples:
  moestro diff path/to/olmoe path/to/tuned
  moestro diff before after --data notes.txt --out tuned.html
  moestro diff traces/eager traces/bf16 --json
  moestro diff before after --weights-only""",
)
COLUMNS = (
    "layer",
    "agree",
    "blind",
    "same_set",
    "load_shift",
    "died",
    "revived",
    "router",
    "experts",
    "most_moved",
)


@app.default
def diff(
    a: Path,
    b: Path,
    /,
    *,
    data: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())] = (),
    weights_only: Annotated[bool, Parameter(negative=())] = False,
    out: Path = Path("diff.html"),
    tokens: Whole = 16384,
    sequence_length: Whole = 256,
    batch_size: Whole = 8,
    json: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
) -> None:
    """Say what changed between two models, or two traces.

    Models are run over the same text; their experts, routers and other tensors are compared. Traces of the same
    tokens are compared choice by choice. Writes a page and, beside it, the same numbers as JSON.

    Args:
        a: a model folder, a run, or a trace that `log.record(folder)` wrote.
        b: another one of the same kind.
        data: files, folders or globs that both models read [default: the default corpus].
        weights_only: run nothing; compare the tensors alone.
        out: the page; the numbers go to the same name with .json.
        tokens: of the text, at most; excerpts are spread evenly over its domains.
        sequence_length: tokens that a model sees at once.
        batch_size: sequences at once.
        json: print the numbers instead of writing anything.
    """
    check_page(out, "diff.html")
    traces = [is_trace(path) for path in (a, b)]
    if any(traces) and not all(traces):
        trace, model = (a, b) if traces[0] else (b, a)
        raise ValueError(f"{trace} is a trace and {model} is none; pass two traces or two models")
    if all(traces):
        if data or weights_only:
            raise ValueError("traces hold choices and nothing else; leave out --data and --weights-only")
        found = compare_traces(a, b)
    else:
        if data and weights_only:
            raise ValueError("--weights-only reads no text; leave out --data")
        found = compare_folders(
            model_folder(a),
            model_folder(b),
            data,
            run=not weights_only,
            tokens=tokens,
            length=sequence_length,
            batch_size=batch_size,
            progress=show_progress(),
        )
    from moestro.inspect.difference_page import write_difference_page

    show_page(found, None if json else out, write_difference_page, _row, COLUMNS)


def is_trace(path: Path) -> bool:
    """Whether a folder holds a recording of routing."""
    return (path / "trace.json").is_file()


def compare_folders(
    a: Path,
    b: Path,
    paths: Sequence[str] = (),
    *,
    run: bool = True,
    tokens: int = 16384,
    length: int = 256,
    batch_size: int = 8,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Compare the tensors of two model folders and, unless `run` is False, their routing on the same text.

    One model is in memory at a time.

    Args:
        a, b: folders of one architecture, with the same layers and numbers of experts.
        paths: files, folders or globs; none = the default corpus.
        run: whether the models are run.
        tokens: of the text, at most.
        length: tokens that a model sees at once.
        batch_size: sequences at once.
        progress: called with a few words now and then.

    Returns: `kind`, `a`, `b`, `text` (None where nothing ran), `tensors` of
        `moestro.hf.differences.weight_differences`, and what `moestro.inspect.difference.difference` returns.

    Raises:
        ValueError: folders that cannot be compared or read, or tokenizers that cut the text differently.
    """
    from moestro.hf.differences import weight_differences
    from moestro.inspect.difference import difference, routing_difference

    weights = weight_differences(a, b, progress)
    of_layer, routing, text = dict(weights["layers"]), {}, None
    if not of_layer and not run:
        raise ValueError(f"{a} has no layer with stacked experts, so that its weights alone say nothing")
    names = list(of_layer)
    if run:
        (one, text), (other, _) = _routes(a, b, paths, tokens, length, batch_size, progress)
        routing = {name: routing_difference(one[name], other[name]) for name in one}
        of_layer = {name: of_layer[layer] for name in one for layer in of_layer if _within(name, layer)}
        names = list(one)
    return {
        "kind": "models",
        "a": str(a),
        "b": str(b),
        "text": text,
        "tensors": weights["tensors"],
    } | difference(names, routing, of_layer)


def compare_traces(a: Path, b: Path) -> dict[str, Any]:
    """Compare two recordings of the same tokens, choice by choice; returns what `compare_folders` does.

    Raises:
        ValueError: traces of two models or of other tokens.
    """
    from moestro.hf.traces import load_trace
    from moestro.inspect.difference import LayerRoutes, difference, routing_difference

    one, other = load_trace(a), load_trace(b)
    one.check_same_tokens(other)
    routing = {}
    for name, count in zip(one.fingerprint.layers, one.fingerprint.num_experts, strict=True):
        pair = LayerRoutes(count), LayerRoutes(count)
        for routes, trace in zip(pair, (one, other), strict=True):
            layer = trace.layers[name]
            routes.add_choices(layer.index, layer.weight, layer.keep)
        routing[name] = routing_difference(*pair)
    return {
        "kind": "traces",
        "a": str(a),
        "b": str(b),
        "text": {"source": None, "tokens": one.num_tokens},
        "tensors": None,
    } | difference(list(routing), routing, {})


def _routes(
    a: Path,
    b: Path,
    paths: Sequence[str],
    tokens: int,
    length: int,
    batch_size: int,
    progress: Callable[[str], None],
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What each model's routers decide on the same windows, and what the text was."""
    from moestro.data import read_documents
    from moestro.data.excerpts import sample_excerpts
    from moestro.hf.pieces import StockTokenizer
    from moestro.hf.subject import open_subject
    from moestro.hf.windows import cut_windows
    from moestro.inspect.difference import add_decisions

    excerpts = sample_excerpts(read_documents(paths or None), max(tokens // length, 1), 8 * length)
    tokenizers = [StockTokenizer(folder) for folder in (a, b)]
    cuts = [[each.start, *(each.encode(excerpt.text) for excerpt in excerpts)] for each in tokenizers]
    if cuts[0] != cuts[1]:
        raise ValueError(
            f"the tokenizers of {a} and {b} cut the same text into other tokens, so that their choices cannot "
            "be compared; pass --weights-only to compare the tensors alone"
        )
    found: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for name, folder in (("A", a), ("B", b)):
        progress(f"loading {name}")
        subject = open_subject(folder)
        longest = min(length, subject.max_length or length)
        if found and longest != length:
            raise ValueError(f"{folder} takes at most {longest} tokens at once; pass --sequence-length {longest}")
        length = longest
        windows = cut_windows(excerpts, tokenizers[0], length, subject.vocab_size)
        routes: dict[str, Any] = {}
        done = 0
        for batch, valid, counted, _ in windows.batches(batch_size):
            add_decisions(routes, subject.route(batch, valid, counted))
            done += len(batch)
            progress(f"{name}: {done} of {len(windows.tokens)} sequences")
        text = {"source": list(paths) or DEFAULT, "tokens": int(windows.counted.sum()), "sequence_length": length}
        found.append((routes, text))
    return found


def _within(module: str, layer: str) -> bool:
    return module == layer or module.startswith(f"{layer}.")


def _row(layer: dict[str, Any]) -> dict[str, Any]:
    experts, router, moved = layer["experts"], layer["router"], None
    if experts is not None:
        known = [(value, expert) for expert, value in enumerate(experts["distance"]) if value is not None]
        moved = max(known, default=None)
    return {
        "layer": layer["label"],
        "agree": _percent(layer["agreement"]),
        "blind": _percent(layer["blind"]),
        "same_set": _percent(layer["same_set"]),
        "load_shift": _percent(layer["load_shift"]),
        "died": _count(layer["died"]),
        "revived": _count(layer["revived"]),
        "router": router and router["distance"],
        "experts": moved and sum(value for value, _ in known) / len(known),
        "most_moved": moved and f"{moved[1]} by {moved[0]:.3g}",
    }


def _count(experts: list[int] | None) -> int | None:
    return None if experts is None else len(experts)


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f} %"
