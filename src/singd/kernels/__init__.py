"""The arithmetic that has a faster form somewhere, in its plain form: the mathematics, and nothing else.

A reader may stop here. The files beside this one hold forms that take less time on some device, each of which
registers itself (`register_kernel`); ``kernels.use("plain")`` switches them all off, and one law in the tests
compares every one of them with its plain form. Off the CPU the plain forms run, but for those of "any" device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from singd.kernels.patches import Patches, Window, windows
from singd.kernels.registry import KERNELS, Kernel, kernel, register_kernel, use

__all__ = [
    "KERNELS",
    "Kernel",
    "Patches",
    "Window",
    "block_gram",
    "correlation",
    "diagonal_sums",
    "kernel",
    "matmul",
    "matmul_symmetric",
    "patch_gram",
    "patch_means",
    "patch_sums",
    "patch_tmm",
    "register_kernel",
    "toeplitz",
    "toeplitz_mm",
    "use",
]


@kernel
def matmul(A: Tensor, B: Tensor) -> Tensor:
    """A B, of matrices, in any memory layout."""
    return A @ B


@kernel
def matmul_symmetric(L: Tensor, R: Tensor) -> Tensor:
    """L R, [n, n], where that is symmetric: for example R = L^T, or R = S L^T with a symmetric S."""
    return L @ R


@kernel
def block_gram(A: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The diagonal k x k blocks of A^T A for A, [m, d]: [d // k, k, k], and the last one [d % k, d % k]."""
    whole = A.shape[1] // k * k
    X, last = A.T[:whole].unflatten(0, (whole // k, k)), A.T[whole:]
    return X @ X.mT, last @ last.T


def toeplitz(t: Tensor, upper: bool) -> Tensor:
    """The triangular Toeplitz matrix, [n, n], of a vector t, [n]: its first row if ``upper``, else its column."""
    T = pad(t, (len(t) - 1, 0)).unfold(0, len(t), 1).flip(0)
    return T if upper else T.T


@kernel
def toeplitz_mm(X: Tensor, *factors: tuple[Tensor, bool]) -> Tensor:
    """Triangular Toeplitz matrices times X, [n, m], one after the other; each as the arguments of `toeplitz`."""
    for t, upper in factors:
        X = toeplitz(t, upper) @ X
    return X


@kernel
def correlation(x: Tensor, t: Tensor) -> Tensor:
    """The sums over s of x[s + j] t[s], [n], for x and t, [n]: what an upper Toeplitz matrix makes of x."""
    return pad(x, (0, len(t) - 1)).unfold(0, len(t), 1) @ t


@kernel
def diagonal_sums(Y: Tensor) -> Tensor:
    """The sums along the diagonal of Y Y^T and along those above it, [n], for Y, [n, m]."""
    n = len(Y)
    shifted = pad(Y @ Y.T, (0, n)).as_strided((n, n), (2 * n + 1, 1))
    return shifted.sum(0)  # whose row i begins at its diagonal, and ends in zeros


@kernel
def patch_gram(p: Patches) -> Tensor:
    """X X^T, [d, d], of patches X, [d, B * places]."""
    X = p.unfold()
    return matmul_symmetric(X, X.T)


@kernel
def patch_sums(p: Patches, squared: bool) -> Tensor:
    """The sum of all patches, [d], or of their squares."""
    X = p.unfold()
    return (X.square() if squared else X).sum(1)


def patch_means(p: Patches) -> Tensor:
    """The mean over the places, for each example, [B, d]."""
    places = tuple(range(2, p.x.ndim))
    parts = [windows(part.padded(), p.window).mean(places).flatten(1) for part in p.split()]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


@kernel
def patch_tmm(p: Patches, Y: Tensor) -> Tensor:
    """X Y, [d, n], of patches X, [d, B * places], with a dense Y, [B * places, n]."""
    return matmul(p.unfold(), Y)


# The faster forms register themselves for the kernels above.
from singd.kernels import cpu_products, fast_patches, fast_toeplitz  # noqa: E402, F401
