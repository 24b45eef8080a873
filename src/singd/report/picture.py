"""A structured matrix in a notebook: its pattern as a small inline picture, in light and dark."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from singd.structures.base import StructuredMatrix

CELLS = 32  # of the picture, along each side
PIXELS = 96


def pattern(A: StructuredMatrix) -> torch.Tensor:
    """Which of at most CELLS x CELLS sampled entries are not zero, without forming A where it is large."""
    index = torch.linspace(0, A.n - 1, min(A.n, CELLS)).round().long()
    columns = torch.zeros(A.n, len(index), dtype=A.dtype, device=A.device)
    columns[index, torch.arange(len(index))] = 1.0
    sampled = A.mm(columns)[index].to(device="cpu", dtype=torch.float64).abs()
    return sampled > 1e-6 * sampled.max()


def html_picture(A: StructuredMatrix) -> str:
    """The pattern, the size and the number of stored numbers as HTML."""
    cells = pattern(A).tolist()
    side = len(cells)
    squares = "".join(
        f'<rect x="{j}" y="{i}" width="1" height="1"/>'
        for i, row in enumerate(cells)
        for j, filled in enumerate(row)
        if filled
    )
    svg = (
        f'<svg width="{PIXELS}" height="{PIXELS}" viewBox="0 0 {side} {side}" fill="currentColor" '
        f'stroke="none" shape-rendering="crispEdges" style="border:1px solid currentColor">{squares}</svg>'
    )
    share = A.numel / A.n**2
    words = f"{type(A).__name__}, {A.n} x {A.n}, {str(A.dtype).removeprefix('torch.')}"
    numbers = f"{A.numel:,} numbers, {share:.1%} of dense"
    return (
        f'<div style="display:flex;gap:1em;align-items:center">{svg}'
        f"<div>{html.escape(words)}<br>{numbers}</div></div>"
    )
