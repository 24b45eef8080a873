"""The table of structures, written from the registry each time that the site is built."""

from __future__ import annotations

import pathlib
import re

import torch

from singd import registered_structures

TABLE = pathlib.Path(__file__).parents[1] / "structures_table.md"
SHOWN, COUNTED = 12, 1000  # sizes: of the pictures, and for the counts
STRUCTURES = registered_structures()  # before pages of the gallery register theirs


def pattern(make) -> str:
    """Which entries of a member may differ from zero, as a small picture."""
    torch.manual_seed(0)
    A = make(SHOWN, dtype=torch.float64)
    A = A.map(torch.randn_like)
    squares = "".join(
        f'<rect x="{j}" y="{i}" width="1" height="1"/>' for i, j in A.dense().nonzero().tolist()
    )
    return (
        f'<svg class="pattern" viewBox="0 0 {SHOWN} {SHOWN}" role="img" aria-label="pattern">'
        f"{squares}</svg>"
    )


def smaller(name: str) -> str:
    """A member of the same family that shows its shape at the size of the pictures."""
    sizes = {"block30diagonal": "block3diagonal", "hierarchical15_15": "hierarchical3_2"}
    return sizes.get(name, name)


def lines():
    """One row per structure; of a family with sizes in its name, its first member."""
    yield "| | name and members | numbers stored | product with a vector | $P(N)$ |"
    yield "|---|---|---|---|---|"
    seen = set()
    for name, s in STRUCTURES.items():
        family = re.sub(r"\d+", "", name)
        if family in seen:
            continue
        seen.add(family)
        projection = ", ".join(f"${part}$" for part in s.projection.split(r",\;"))
        count = s(COUNTED, device="meta").numel
        yield (
            f"| {pattern(STRUCTURES[smaller(name)])} | `{name}`<br>{s.members} "
            f"| ${s.numbers}$<br>{count:,} | ${s.cost}$ | {projection} |"
        )


def write(app, config):
    text = "\n".join(lines()) + "\n"
    if not TABLE.exists() or TABLE.read_text() != text:  # unchanged: no page is read again
        TABLE.write_text(text)


def setup(app):
    # before the gallery runs in this process, whose pages register structures of their own
    app.connect("config-inited", write)
    return {"parallel_read_safe": True}
