"""An optimizer as a table of its layers."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from singd.blocks import Block
from singd.checkpoint import state_bytes
from singd.groups import Groups
from singd.rules import INPUT, OUTPUT
from singd.state import States

HEADER = ("layer", "kind", "matrix", "K", "C", "state bytes", "group")


def rows(
    blocks: Sequence[Block],
    names: Mapping[Any, str],
    reasons: Mapping[Any, str],
    param_groups: Groups,
    states: States,
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

    def size(params: Sequence[Any]) -> str:
        return f"{sum(state_bytes(states[p]) for p in params if p in states):,}"

    lines: list[tuple[str, ...]] = []
    seen = set()
    for block in blocks:
        if block.weight not in group_of:
            continue
        seen.update(block.params)
        layer = " = ".join(block.names), type(block.modules[0]).__name__
        K, C = (block.structures()[side].name for side in (INPUT, OUTPUT))
        matrix, group = "{} x {}".format(*block.size), str(group_of[block.weight])
        lines.append((*layer, matrix, K, C, size(block.params), group))
    for p, name in names.items():
        if p in seen:
            continue
        i, reason = group_of.get(p), reasons.get(p)
        what = "left out" if i is None else param_groups[i]["algorithm"]
        what += f" ({reason})" if reason else ""
        shape, group = " x ".join(map(str, p.shape)) or "1", "-" if i is None else str(i)
        lines.append((name, what, shape, "-", "-", size([p]), group))
    return lines


def table(
    rows: Sequence[tuple[str, ...]], header: tuple[str, ...] = HEADER, title: str = "SINGD"
) -> str:
    """The rows as aligned text."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    text.insert(1, "-" * max(map(len, text)))
    return "\n".join([title, *text])


def html_table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...] = HEADER) -> str:
    """The rows for a notebook."""

    def line(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    body = "".join(line(r, "td") for r in rows)
    return f"<table><thead>{line(header, 'th')}</thead><tbody>{body}</tbody></table>"
