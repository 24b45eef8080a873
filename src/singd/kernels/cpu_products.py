"""Products on a CPU that take less time than torch's own: aligned ones, and those known to be symmetric.

Each constant was found with one thread of an x86 CPU and float32; ``tests/benchmarks/kernels.py`` says what each
trick saves of a whole training step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from singd.kernels.registry import register_kernel

BLOCK = 64
"""Width of the blocks of half a product, at least; see `_block_width`."""

LEAST = 2**16
"""How many numbers each factor of a product has at least for halving to pay."""

ALIGNED = 16
"""Products whose rows begin at multiples of so many numbers take less time."""

NARROW = 64
"""A product with fewer columns is formed as rows, as those of bordered factors with rows are."""


def empty_padded(like: Tensor, n: int, m: int) -> Tensor:
    """An uninitialised [n, m] with aligned rows."""
    return like.new_empty(n, -(-m // ALIGNED) * ALIGNED)[:, :m]


def _differentiated(*matrices: Tensor) -> bool:
    """Whether autograd follows, which writes into no given memory."""
    return torch.is_grad_enabled() and any(A.requires_grad for A in matrices)


def matmul(A: Tensor, B: Tensor) -> Tensor:
    """A B, perhaps with room behind each row, or as the transpose of rows."""
    n, m = A.shape[0], B.shape[1]
    if m < min(n, NARROW):
        return (B.T @ A.T).T
    # Layers with a bias have factors of odd sizes like 769, of which torch would store the rows one by one.
    known = A.dtype == B.dtype and A.dtype in (torch.float32, torch.float64)
    if not known or m % ALIGNED == 0 or min(n, m) < 8 * ALIGNED or _differentiated(A, B):
        return A @ B
    return torch.mm(A, B, out=empty_padded(A, n, m))


def halving_pays(n: int, m: int) -> bool:
    """Whether half of a product [n, m] times [m, n] takes less time than all of it."""
    return n > BLOCK and n * m >= LEAST


def symmetric_share(n: int) -> float:
    """What a symmetric product [n, n] of many columns takes of the time of another one."""
    return 0.6 if n > 2 * BLOCK else 0.8 if n > BLOCK else 1.0


def _row_blocks(n: int) -> list[tuple[int, int]]:
    """The rows of each block of half a product, (start, stop)."""
    # Narrow blocks multiply more slowly, wide ones form more of the other half: best about n / 8.
    width = max(BLOCK, min(128, n // 8 // 32 * 32))
    return [(start, min(start + width, n)) for start in range(0, n, width)]


def matmul_symmetric(L: Tensor, R: Tensor) -> Tensor:
    """L R where that is symmetric: the lower half is multiplied, block by block, and mirrored."""
    n, m = L.shape
    if not halving_pays(n, m) or _differentiated(L, R):
        return matmul(L, R)
    product = empty_padded(L, n, n)
    for start, stop in _row_blocks(n):
        torch.mm(L[start:stop], R[:, :stop], out=product[start:stop, :stop])
    return mirror_(product)


def add_(total: Tensor, L: Tensor, R: Tensor) -> None:
    """Add L R to a total of the same or a wider dtype."""
    if total.dtype == L.dtype:
        total.addmm_(L, R)
    else:
        total += L @ R


def add_symmetric_(total: Tensor, L: Tensor, R: Tensor) -> None:
    """Add L R, symmetric, to the lower half of a total; the last addition is followed by `mirror_`."""
    for start, stop in _row_blocks(len(L)) if halving_pays(*L.shape) else [(0, len(L))]:
        add_(total[start:stop, :stop], L[start:stop], R[:, :stop])


def mirror_(total: Tensor) -> Tensor:
    """Copy the lower half of a matrix, [n, n], over the upper one, where only that was formed."""
    for start, stop in _row_blocks(len(total)):
        total[:start, start:stop] = total[start:stop, :start].T
    return total


def block_gram(A: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The diagonal blocks of A^T A; each is multiplied with the first rows of the next, which are not used."""
    size, d = _rounded(k), A.shape[1]
    count, inside = d // k, (d - size) // k + 1
    X = A.T
    first = X.unfold(0, size, k).mT
    others = X[inside * k : count * k].unflatten(0, (count - inside, k))
    last = X[count * k :]
    return torch.cat([(first @ first.mT)[:, :k, :k], others @ others.mT]), last @ last.T


def _rounded(k: int) -> int:
    """The next multiple of 16: products of 32 rows take less time than those of 30."""
    return 16 * -(-k // 16)


def _rounding_pays(A: Tensor, k: int) -> bool:
    """Whether a near multiple of 16 rows fits into A at least once."""
    return 0 < _rounded(k) - k <= k // 8 and _rounded(k) <= A.shape[1]


register_kernel("matmul", "cpu", matmul)
register_kernel("matmul_symmetric", "cpu", matmul_symmetric)
register_kernel("block_gram", "cpu", block_gram, _rounding_pays)
