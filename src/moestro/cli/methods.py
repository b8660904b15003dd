"""`moestro methods`: list the routing methods and the papers they follow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from moestro.cli.catalogue import catalogue_page
from moestro.cli.parts import source_file
from moestro.cli.terminal import print_json, print_table

if TYPE_CHECKING:
    from moestro.methods import Method

app = App(
    name="methods",
    help_epilogue="""\
Examples:
  moestro methods
  moestro methods --family token-choice
  moestro methods --json""",
)
COLUMNS = ("name", "family", "paper", "causal", "summary")


@app.default
def methods(
    *,
    family: str | None = None,
    json: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    markdown: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
) -> None:
    """List the routing methods and the papers they follow.

    Args:
        family: one family only, for example token-choice.
        json: print everything known about them, for machines.
        markdown: print a page for the documentation.
    """
    from moestro.methods import all_methods

    found = [method for method in all_methods().values() if family in (None, method.family)]
    if not found:
        families = sorted({method.family for method in all_methods().values()})
        raise ValueError(f"no method of family {family!r}; families are {', '.join(families)}")
    rows = [method_facts(method) for method in found]
    if markdown:
        print(methods_page(rows), end="")
        return
    print_json(rows) if json else print_table(rows, COLUMNS, one_line=True)


def method_facts(method: Method) -> dict[str, Any]:
    """What is known about a method, as plain values."""
    names = ("name", "catalogue", "family", "title", "paper", "year", "arxiv", "causal", "batch_independent")
    options = {
        option.name: {
            "type": option.type_name,
            "required": option.required,
            "default": None if option.required else option.default,
        }
        for option in method.options.values()
    }
    facts = {name: getattr(method, name) for name in names}
    return {**facts, "summary": method.summary, "file": source_file(method.recipe), "options": options}


def methods_page(rows: list[dict[str, Any]]) -> str:
    """A page of tables: by family what each method is, its paper and what it promises; by catalogue id its parts.

    Args:
        rows: of `method_facts`.
    """
    lines = ["# Methods", "", PREFACE]
    for family in dict.fromkeys(sorted(row["family"] for row in rows)):
        lines += [
            "",
            f"## {family}",
            "",
            "| method | what it does | paper | causal | alone |",
            "|---|---|---|---|---|",
        ]
        lines += [_page_row(row) for row in rows if row["family"] == family]
    return "\n".join([*lines, "", *catalogue_page()]) + "\n"


PREFACE = """\
`moestro methods --markdown` wrote this page. Build any of them with `moestro.build(name, ...)`, draw its parts
with `moestro show NAME`, train it with `moestro train --method NAME`. *causal*: later tokens cannot change
earlier outputs, so a language model can be trained with it. *alone*: a sequence's output does not depend on the
others of its batch. Both are for the default options, and tests hold them to the behaviour."""


def _page_row(row: dict[str, Any]) -> str:
    paper = f"[{row['paper']}](https://arxiv.org/abs/{row['arxiv']})" if row["arxiv"] else row["paper"]
    marks = ["yes" if row[name] else "no" for name in ("causal", "batch_independent")]
    summary = row["summary"].replace("|", "\\|")
    return f"| `{row['name']}` | {summary} | {paper} | {' | '.join(marks)} |"
