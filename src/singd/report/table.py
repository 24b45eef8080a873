"""An optimizer as a table of its layers."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from singd.blocks import Block
from singd.checkpoint import state_bytes
from singd.rules import INPUT, OUTPUT

HEADER = ("layer", "kind", "matrix", "K", "C", "state bytes", "group")


def rows(
    blocks: Sequence[Block],
    names: Mapping[Any, str],
    reasons: Mapping[Any, str],
    param_groups: Sequence[Mapping[str, Any]],
    states: Mapping[Any, Mapping[str, Any]],
) -> list[tuple[str, ...]]:
    """One row per layer, then one per parameter that the fallback trains or that is left out.

    Args:
        blocks: Those that are preconditioned.
        names: Of all parameters of the model.
        reasons: Why some of them are not preconditioned.
        param_groups: The optimizer's.
        states: The optimizer's.
    """
    group_of = {p: i for i, g in enumerate(param_groups) for p in g["params"]}
    lines: list[tuple[str, ...]] = []
    seen = set()
    for block in blocks:
        if block.weight not in group_of:
            continue
        d_o, d_i = block.size
        seen.update(block.params)
        structures = block.structures()
        size = sum(state_bytes(states[p]) for p in block.params if p in states)
        lines.append(
            (
                " = ".join(block.names),
                type(block.modules[0]).__name__,
                f"{d_o} x {d_i}",
                structures[INPUT].name,
                structures[OUTPUT].name,
                f"{size:,}",
                str(group_of[block.weight]),
            )
        )
    for p, name in names.items():
        if p in seen:
            continue
        group = group_of.get(p)
        what = "left out" if group is None else param_groups[group]["algorithm"]
        reason = reasons.get(p)
        size = state_bytes(states[p]) if p in states else 0
        shape = " x ".join(map(str, p.shape)) or "1"
        lines.append(
            (
                name,
                what + (f" ({reason})" if reason else ""),
                shape,
                "-",
                "-",
                f"{size:,}",
                "-" if group is None else str(group),
            )
        )
    return lines


def table(
    rows: Sequence[tuple[str, ...]], header: tuple[str, ...] = HEADER, title: str = "SINGD"
) -> str:
    """The rows as aligned text."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = [
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    text.insert(1, "-" * max(map(len, text)))
    return f"{title}\n" + "\n".join(text)


def html_table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...] = HEADER) -> str:
    """The rows for a notebook."""

    def line(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    body = "".join(line(r, "td") for r in rows)
    return f"<table><thead>{line(header, 'th')}</thead><tbody>{body}</tbody></table>"
