"""A structured matrix in a notebook: its pattern as a small inline picture, in light and dark."""

from __future__ import annotations

import html

import torch
from torch import Tensor

CELLS = 32  # of the picture, along each side
PIXELS = 96


def sampled(n: int) -> tuple[Tensor, Tensor]:
    """Which of n rows and columns the picture shows, [c] with c <= CELLS, and these columns of I, [n, c]."""
    index = torch.linspace(0, n - 1, min(n, CELLS)).round().long()
    columns = torch.zeros(n, len(index))
    columns[index, torch.arange(len(index))] = 1.0
    return index, columns


def html_picture(entries: Tensor, words: str, numbers: str) -> str:
    """Which entries, [c, c], are not zero, as a picture beside two lines of text, in HTML."""
    size = entries.detach().to(device="cpu", dtype=torch.float64).abs()
    side = len(size)
    cells = (size > 1e-6 * size.max()).nonzero().tolist() if side else []
    squares = "".join(f'<rect x="{j}" y="{i}" width="1" height="1"/>' for i, j in cells)
    svg = (
        f'<svg width="{PIXELS}" height="{PIXELS}" viewBox="0 0 {side} {side}" fill="currentColor" '
        f'stroke="none" shape-rendering="crispEdges" style="border:1px solid currentColor">{squares}</svg>'
    )
    return (
        f'<div style="display:flex;gap:1em;align-items:center">{svg}'
        f"<div>{html.escape(words)}<br>{numbers}</div></div>"
    )
