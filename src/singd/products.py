"""Matrix products whose result is known to be symmetric, at little more than half of the price."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
"""Width of the blocks: smaller ones multiply more slowly, larger ones form more of the other half (measured)."""


def halving_pays(n: int, m: int, device: torch.device) -> bool:
    """Whether half of a product [n, m] times [m, n] takes less time than all of it (measured on a CPU).

    On other devices one large product is taken to be faster than several smaller ones; not measured.
    """
    return device.type == "cpu" and n >= 2 * BLOCK and m >= BLOCK


def symmetric(L: Tensor, R: Tensor) -> Tensor:
    """L R where that is symmetric: the lower half is multiplied, block by block, and mirrored.

    Args:
        L: [n, m].
        R: [m, n] such that L R is symmetric, for example L^T, or S L^T with a symmetric S.

    Returns:
        [n, n]. Its halves agree to the last bit only where halving pays.
    """
    n, m = L.shape
    if not halving_pays(n, m, L.device):
        return L @ R
    product = L.new_empty(n, n)
    for i in range(0, n, BLOCK):
        torch.mm(L[i : i + BLOCK], R[:, : i + BLOCK], out=product[i : i + BLOCK, : i + BLOCK])
    for i in range(BLOCK, n, BLOCK):
        product[:i, i : i + BLOCK] = product[i : i + BLOCK, :i].T
    return product
