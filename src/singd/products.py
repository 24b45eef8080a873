"""Matrix products that take less time than torch's own on a CPU: aligned ones, and those known to be symmetric."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64
"""Width of the blocks of half a product, at least; see `_block_width`."""

LEAST = 2**16
"""How many numbers each factor of a product has at least for halving to pay (measured on a CPU)."""

ALIGNED = 16
"""On a CPU, products whose rows begin at multiples of so many numbers are up to 1.4 times as fast (measured)."""

APART = 2**8
"""Rows that lie a multiple of so many numbers apart share their places in the cache."""

NARROW = 64
"""A product with fewer columns is formed as rows: up to twice as fast, and never slower (measured on a CPU)."""


def _room(like: Tensor, n: int, m: int) -> Tensor:
    """Uninitialised room for [n, m], with aligned rows that do not share their places in the cache."""
    width = -(-m // ALIGNED) * ALIGNED
    if width % APART == 0:
        width += ALIGNED
    return like.new_empty(n, width)[:, :m]


def _aligned(like: Tensor, n: int, m: int) -> Tensor | None:
    """Uninitialised room for [n, m] with aligned rows, or None where it would not help.

    Layers with a bias have factors of odd sizes like 769, of which torch would store the rows one by one.
    """
    known = like.dtype in (torch.float32, torch.float64)
    if like.device.type != "cpu" or not known or m % ALIGNED == 0 or min(n, m) < 8 * ALIGNED:
        return None
    return _room(like, n, m)


def as_rows(view: Tensor, first: int) -> Tensor:
    """A view as a matrix [n, m]: its first dimensions count the rows, all others the columns.

    Rows that would share their places in the cache get some room between them, which makes products up to
    1.2 times as fast (measured on a CPU).
    """
    n, m = view.shape[:first].numel(), view.shape[first:].numel()
    if m == 0 or m % APART:
        return view.flatten(first).flatten(0, first - 1)
    rows = _room(view, n, m)
    rows.unflatten(1, view.shape[first:]).unflatten(0, view.shape[:first]).copy_(view)
    return rows


def _differentiated(*matrices: Tensor) -> bool:
    """Whether autograd follows, which writes into no room."""
    return torch.is_grad_enabled() and any(A.requires_grad for A in matrices)


def multiply(A: Tensor, B: Tensor) -> Tensor:
    """A B, [n, m], perhaps with room behind each row, or as the transpose of rows."""
    n, m = len(A), B.shape[1]
    if m < min(n, NARROW):
        return (B.T @ A.T).T
    room = None
    if A.dtype == B.dtype and not _differentiated(A, B):
        room = _aligned(A, n, m)
    return A @ B if room is None else torch.mm(A, B, out=room)


def halving_pays(n: int, m: int, device: torch.device) -> bool:
    """Whether half of a product [n, m] times [m, n] takes less time than all of it (measured on a CPU).

    On other devices one large product is taken to be faster than several smaller ones; not measured.
    """
    return device.type == "cpu" and n > BLOCK and n * m >= LEAST


def symmetric_share(n: int) -> float:
    """What a symmetric product [n, n] of many columns takes of the time of another one (measured on a CPU)."""
    return 0.6 if n > 2 * BLOCK else 0.8 if n > BLOCK else 1.0


def _block_width(n: int) -> int:
    """Narrow blocks multiply more slowly, wide ones form more of the other half: best about n / 8 (measured)."""
    return max(BLOCK, min(128, n // 8 // 32 * 32))


def symmetric(L: Tensor, R: Tensor) -> Tensor:
    """L R where that is symmetric: the lower half is multiplied, block by block, and mirrored.

    Args:
        L: [n, m].
        R: [m, n] such that L R is symmetric, for example L^T, or S L^T with a symmetric S.

    Returns:
        [n, n], whose halves agree up to rounding.
    """
    n, m = L.shape
    if not halving_pays(n, m, L.device) or _differentiated(L, R):
        return multiply(L, R)
    product = _room(L, n, n)
    for start, stop in _blocks(n):
        torch.mm(L[start:stop], R[:, :stop], out=product[start:stop, :stop])
    return mirror_(product)


def add_symmetric_(total: Tensor, L: Tensor, R: Tensor) -> None:
    """Add L R, as of `symmetric`, to the lower half of a total; what is above the diagonal has no meaning.

    Args:
        total: [n, n], of the same or a wider dtype; `mirror_` completes it after the last addition.
        L: [n, m].
        R: [m, n].
    """
    n, m = L.shape
    if total.dtype != L.dtype:
        total += L @ R
        return
    for start, stop in _blocks(n) if halving_pays(n, m, L.device) else [(0, n)]:
        total[start:stop, :stop].addmm_(L[start:stop], R[:, :stop])


def mirror_(total: Tensor) -> Tensor:
    """Copy the lower half of a matrix, [n, n], over the upper one, where only that was formed."""
    for start, stop in _blocks(len(total)) if total.device.type == "cpu" else ():
        total[:start, start:stop] = total[start:stop, :start].T
    return total


def _blocks(n: int) -> list[tuple[int, int]]:
    """The rows of each block, (start, stop)."""
    width = _block_width(n)
    return [(start, min(start + width, n)) for start in range(0, n, width)]
