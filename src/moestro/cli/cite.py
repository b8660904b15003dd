"""`moestro cite`: the BibTeX entry of a method's paper."""

from __future__ import annotations

from cyclopts import App

app = App(
    name="cite",
    help_epilogue="""\
Examples:
  moestro cite deepseek-v3
  moestro cite switch mixtral >> references.bib""",
)


@app.default
def cite(method: str, /, *methods: str) -> None:
    """Print the BibTeX entry of a method's paper.

    Args:
        method: its name, see `moestro methods`.
        methods: more of them.
    """
    from moestro.methods import find_method

    print("\n\n".join(find_method(name).bibtex().strip() for name in (method, *methods)))
