"""Runs the pages of the gallery and writes what they print, draw and compute back into them.

    python docs/mixtures/build.py [page.md ...]

A page is its own source. Its `python` blocks run from top to bottom in one scope; what a block prints replaces the
`text` block below it; a figure that it leaves open becomes `pictures/<page>-<number>.png`; and in the text
`<!--=expression-->value<!--/-->` gets its value anew.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path

FOLDER = Path(__file__).parent
_PART = re.compile(r"```python\n(.*?)```\n(?:\n```text\n.*?```\n)?|<!--=(.*?)-->.*?<!--/-->", re.DOTALL)


def rebuild(page: str, name: str, keep: Callable[[str], None]) -> str:
    """The page with its outputs and numbers computed again; `keep` saves the current figure under a file name."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.close("all")
    scope: dict[str, object] = {}
    drawn = 0

    def replace(part: re.Match[str]) -> str:
        nonlocal drawn
        code, expression = part.groups()
        if code is None:
            return f"<!--={expression}-->{eval(expression, scope)}<!--/-->"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"<{name}.md>", "exec"), scope)
        for number in plt.get_fignums():
            drawn += 1
            picture = f"{name}-{drawn}.png"
            if f"(pictures/{picture})" not in page:
                raise ValueError(f"{name}.md draws {picture} but does not show it; add ![...](pictures/{picture})")
            plt.figure(number)
            keep(picture)
        plt.close("all")
        output = printed.getvalue()
        return f"```python\n{code}```\n" + (f"\n```text\n{output}```\n" if output else "")

    with plt.rc_context(
        {"figure.dpi": 80, "savefig.dpi": 80, "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    ):
        return _PART.sub(replace, page)


def save(picture: str) -> None:
    """Write the current figure beside the pages, in few colours to keep it small."""
    import matplotlib.pyplot as plt

    target = FOLDER / "pictures" / picture
    target.parent.mkdir(exist_ok=True)
    plt.savefig(target, pil_kwargs={"optimize": True})


def main(names: list[str]) -> None:
    for path in [FOLDER / name for name in names] or sorted(FOLDER.glob("*.md")):
        path.write_text(rebuild(path.read_text(), path.stem, save))
        print(path.name, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
