"""The arithmetic that has a faster form somewhere, in its plain form: the mathematics, and nothing else.

A reader may stop here. The files beside this one hold forms that take less time on some device, each of which
registers itself (`register_kernel`); ``kernels.use("plain")`` switches them all off, and one law in the tests
compares every one of them with its plain form. Off the CPU the plain forms run, but for those of "any" device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from singd.kernels.patches import Patches, Window
from singd.kernels.registry import KERNELS, Kernel, kernel, register_kernel, use

__all__ = [
    "KERNELS",
    "Kernel",
    "Patches",
    "Window",
    "block_gram",
    "diagonal_sums",
    "few_columns_pay",
    "kernel",
    "matmul",
    "matmul_symmetric",
    "patch_gram",
    "patch_means",
    "patch_sums",
    "patch_tmm",
    "register_kernel",
    "toeplitz_mm",
    "use",
    "wide",
]


def wide(t: Tensor) -> torch.dtype:
    """The dtype to sum in: float32 for half precision, whose sums would stall, else the tensor's own."""
    return torch.promote_types(t.dtype, torch.float32)


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


@kernel
def few_columns_pay(like: Tensor) -> bool:
    """Whether to multiply a few columns of rows rather than all: fewer numbers, but more operators to start."""
    return False


@kernel
def toeplitz_mm(X: Tensor, *factors: tuple[Tensor, bool]) -> Tensor:
    """Triangular Toeplitz matrices times X, [n, m], one after the other.

    Each is a vector t, [n], and whether it is the first row of an upper triangular one or else the first column
    of a lower one. By FFT: products with a lower one are convolutions with t, with an upper one correlations.
    """
    n, length = len(X), _power_of_two(2 * len(X))
    for t, upper in factors if X.numel() else ():  # (some libraries refuse to transform nothing)
        spectrum = torch.fft.rfft(t.to(wide(t)), length)[:, None]
        product = torch.fft.rfft(X.to(wide(X)), length, dim=0)
        product = product * (spectrum.conj() if upper else spectrum)
        X = torch.fft.irfft(product, length, dim=0)[:n].to(torch.promote_types(t.dtype, X.dtype))
    return X


@kernel
def diagonal_sums(Y: Tensor) -> Tensor:
    """The sums along the diagonal of Y Y^T and along those above it, [n], for Y, [n, m]."""
    if not Y.numel():
        return Y.new_zeros(len(Y))
    length = _power_of_two(2 * len(Y))
    power = torch.fft.rfft(Y, length, dim=0).abs().square().sum(1)
    return torch.fft.irfft(power, length)[: len(Y)]


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


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


@kernel
def patch_means(p: Patches) -> Tensor:
    """The mean over the places, for each example, [B, d]."""
    return p.unfold().unflatten(1, (len(p.x), p.places.numel())).mean(2).T


@kernel
def patch_tmm(p: Patches, Y: Tensor) -> Tensor:
    """X Y, [d, n], of patches X, [d, B * places], with a dense Y, [B * places, n]."""
    return matmul(p.unfold(), Y)


# The faster forms register themselves for the kernels above.
from singd.kernels import cpu_products, cpu_toeplitz, fast_patches  # noqa: E402, F401
