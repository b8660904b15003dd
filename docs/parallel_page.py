"""Writes what `docs/parallel.md` takes from the code: the table of bytes, and the picture `docs/mesh.svg`.

    python docs/parallel_page.py

The figures are those of the closed forms to which the tests hold every transport, to the byte.
"""

from __future__ import annotations

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "tests"))

from oracles.wire_bytes import Form  # noqa: E402

from moestro.parallel import MeshShape, rank_groups  # noqa: E402

CASE = {
    "load": "random", "ranks": 8, "per_node": 4, "experts": 64, "top_k": 8, "tokens": 1024, "bytes": 2,
    "width": 2048, "hidden": 1024,
}  # fmt: skip
USES = {
    "linear": "the plain uneven all-to-all",
    "capacity": "shapes that do not depend on the load",
    "two-level": "1 message to the other machine instead of 4",
    "leader": "1 message per machine: machines with one card",
    "deduplicated": "a token crosses to a machine once",
    "gather": "few ranks, many experts per token",
    "chunked": "experts compute while others travel",
    "pairwise": "likewise, one distance between ranks after another",
    "adaptive": "rows or slices travel, whichever are less, call by call",
    "shadow": "like `linear`, but hot experts travel where that is shorter; here none is",
    "data-centric": "experts travel: small ones, many tokens",
}
COLUMNS = [(phase, link) for phase in ("forward", "backward") for link in ("intra", "inter")]
BEGIN, END = "<!-- bytes: python docs/parallel_page.py -->", "<!-- end of bytes -->"


def table() -> str:
    """MB that a rank sends in one layer, the mean of all ranks."""
    words = {"intra": "within", "inter": "between"}
    lines = ["| transport | " + " | ".join(f"{words[link]}, {phase}" for phase, link in COLUMNS) + " | what for |"]
    lines.append("|---" * (len(COLUMNS) + 2) + "|")
    for name, use in USES.items():
        form = Form({**CASE, "transport": name})
        sent = [form.at(rank) for rank in range(form.ranks)]
        means = [
            sum(n for each in sent for (_, *where), n in each.items() if where == [phase, link]) / len(sent)
            for phase, link in COLUMNS
        ]
        lines.append(f"| `{name}` | " + " | ".join(f"{n / 1e6:.1f}" for n in means) + f" | {use} |")
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with the table of today's code."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


INK, SOFT, PAPER = "#1f2430", "#5b6472", "#ffffff"
MACHINES = ("#e8eef9", "#fbeee0")
COLOURS = ("#3b6fb6", "#c46a1b", "#3a8f5c", "#9a4fa3")  # of the experts that a rank holds


def picture(shape: MeshShape, experts: int, per_node: int) -> str:
    """Both factorings of one world, as an SVG: the ranks of the experts' mesh, and what travels along its axes."""
    sizes = {"expert": shape.expert, "data": shape.data}
    rows = rank_groups(sizes, ["expert"])
    cell, high, left, top = 150, 96, 40, 150
    wide, slots = left * 2 + cell * shape.expert, experts // shape.expert
    below = top + shape.data * (high + 84)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {below + 62}" role="img" '
        f'font-family="Helvetica, Arial, sans-serif" text-anchor="middle" font-size="20" fill="{INK}">',
        f"<title>{shape.ranks} processes as data={shape.data}, expert={shape.expert}</title>",
        f'<rect width="100%" height="100%" fill="{PAPER}"/>',
        _text(
            wide / 2, 40, f"{shape.ranks} processes: data={shape.data}, expert={shape.expert}", 28, weight="bold"
        ),
    ]
    for column in range(shape.expert):
        middle, first = left + cell * (column + 0.5), column * slots
        parts.append(_text(middle, 92, "experts", 19, COLOURS[column % len(COLOURS)]))
        parts.append(
            _text(middle, 116, f"{first} to {first + slots - 1}", 21, COLOURS[column % len(COLOURS)], "bold")
        )
    for line, ranks in enumerate(rows):
        y = top + line * (high + 84)
        machine = ranks[0] // per_node
        parts.append(
            f'<rect x="{left - 24}" y="{y - 14}" width="{cell * shape.expert + 48}" height="{high + 62}" rx="14" '
            f'fill="{MACHINES[machine % len(MACHINES)]}"/>'
        )
        for column, rank in enumerate(ranks):
            x = left + cell * column + 14
            colour = COLOURS[column % len(COLOURS)]
            parts.append(
                f'<rect x="{x}" y="{y}" width="{cell - 28}" height="{high - 30}" rx="10" fill="{PAPER}" '
                f'stroke="{colour}" stroke-width="4"/>'
            )
            parts.append(_text(x + cell / 2 - 14, y + 42, f"rank {rank}", 24))
        arrow = y + high - 12
        parts.append(_arrow(left + 22, arrow, left + cell * shape.expert - 22, arrow))
        words = f"machine {machine}: rows travel to their experts and back"
        parts.append(_text(wide / 2, arrow + 30, words, 20))
    last = top + (shape.data - 1) * (high + 84)
    for column in range(shape.expert):
        x = left + cell * (column + 0.5)
        parts.append(_arrow(x, top + high + 50, x, last - 4, COLOURS[column % len(COLOURS)]))
    parts.append(_text(wide / 2, below + 14, "up and down: ranks with the same experts add up their gradients", 20))
    parts.append(_text(wide / 2, below + 46, "all ranks: everything else, each with tokens of its own", 20, SOFT))
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, y: float, words: str, size: int, colour: str = INK, weight: str = "normal") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" fill="{colour}">{words}</text>'


def _arrow(x: float, y: float, to_x: float, to_y: float, colour: str = SOFT) -> str:
    """A line with a head at both ends."""
    across = y == to_y
    heads = []
    for tip_x, tip_y, sign in ((x, y, 1), (to_x, to_y, -1)):
        wings = [(12 * sign, 7), (12 * sign, -7)] if across else [(7, 12 * sign), (-7, 12 * sign)]
        points = " ".join(f"{tip_x + a:g},{tip_y + b:g}" for a, b in [(0, 0), *wings])
        heads.append(f'<polygon points="{points}" fill="{colour}"/>')
    line = f'<line x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}" stroke="{colour}" stroke-width="4"/>'
    return line + "".join(heads)


def mesh_picture() -> str:
    """The picture of the page."""
    return picture(MeshShape(data=2, expert=4), experts=64, per_node=4)


if __name__ == "__main__":
    (DOCS / "mesh.svg").write_text(mesh_picture())
    path = DOCS / "parallel.md"
    path.write_text(page(path.read_text()))
