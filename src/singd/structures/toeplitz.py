"""Triangular Toeplitz matrices: products are truncated convolutions, by FFT."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from singd.structures.base import StructuredMatrix, wide

SMALL = 256
"""Up to this n a product with the n x n matrix itself is faster than one by FFT (measured, one thread)."""
CHUNK = 2**17
"""So many numbers are transformed at a time: they stay in the cache, which halves the time (measured)."""


@dataclass(eq=False, repr=False)
class UpperToeplitz(StructuredMatrix):
    """A[i, j] = t[j - i] for j >= i, else 0.

    P(N) has the mean of N's diagonal on its own, and twice the mean of N's j-th off-diagonal on its j-th.
    """

    t: Tensor  # [n], the first row

    @classmethod
    def eye(cls, n: int, **kw: Any) -> UpperToeplitz:
        t = torch.zeros(n, **kw)
        t[:1] = 1.0
        return cls(t)

    @property
    def n(self) -> int:
        return self.t.shape[0]

    def mm(self, X: Tensor) -> Tensor:
        if self.n <= SMALL:
            return self.dense() @ X
        return _convolve(X, (self.t, True))

    def tmm(self, X: Tensor) -> Tensor:
        if self.n <= SMALL:
            return self.dense().T @ X
        return _convolve(X, (self.t, False))

    def outer(self, X: Tensor) -> Tensor:
        if self.n <= SMALL:
            return self.mm(self.tmm(X))
        return _convolve(X, (self.t, False), (self.t, True))

    def co_outer(self, X: Tensor) -> Tensor:
        if self.n <= SMALL:
            return self.tmm(self.mm(X))
        return _convolve(X, (self.t, True), (self.t, False))

    def compose(self, other: UpperToeplitz) -> UpperToeplitz:
        return UpperToeplitz(_convolve(other.t[:, None], (self.t, False))[:, 0])

    def project(self, Y: Tensor) -> UpperToeplitz:
        Y = Y.to(wide(Y))
        if self.n <= SMALL and Y.shape[1] > 2:
            return self._means(_diagonal_sums(Y @ Y.T))
        length = _fast_length(2 * self.n - 1)
        power = Y.new_zeros(length // 2 + 1)
        for rows in Y.T.split(max(1, CHUNK // length)) if Y.numel() else ():
            spectrum = torch.fft.rfft(rows.contiguous(), length)
            power += torch.view_as_real(spectrum).square().sum(dim=(0, 2))
        return self._means(torch.fft.irfft(power, length)[: self.n])

    def gram(self) -> UpperToeplitz:
        # The j-th off-diagonal of A^T A sums to sum over s of (n - j - s) t[s] t[s + j]: two correlations.
        # They cancel for j near n, hence float64 (of vectors only), where the device has it.
        t = self.t.to(self.t.dtype if self.t.device.type == "mps" else torch.float64)
        length = _fast_length(2 * self.n - 1)
        s = torch.arange(self.n, dtype=t.dtype, device=t.device)
        spectrum = torch.fft.rfft(torch.stack([t, s * t]), length)
        correlations = torch.fft.irfft(spectrum.conj() * spectrum[0], length)[:, : self.n]
        return self._means((self.n - s) * correlations[0] - correlations[1])

    def cogram(self) -> UpperToeplitz:
        return (
            self.gram()
        )  # A A^T is A^T A mirrored in its antidiagonal, which keeps each diagonal's sum

    def add_identity_(self, alpha: float | Tensor) -> UpperToeplitz:
        self.t[:1].add_(alpha)
        return self

    def trace(self) -> Tensor:
        return self.n * self.t[0].to(wide(self.t))

    def dense(self) -> Tensor:
        padded = torch.cat([self.t.new_zeros(self.n - 1), self.t])
        return padded.unfold(0, self.n, 1).flip(0).clone()

    def _means(self, sums: Tensor) -> UpperToeplitz:
        """The projection whose diagonals have these sums, [n]."""
        means = sums / torch.arange(self.n, 0, -1, dtype=sums.dtype, device=sums.device)
        means[1:] *= 2
        return UpperToeplitz(means.to(self.t.dtype))


def _convolve(X: Tensor, *factors: tuple[Tensor, bool]) -> Tensor:
    """The first n rows of the convolutions, one after the other, of vectors t, [n], with the columns of X, [n, m].

    Args:
        X: [n, m].
        factors: For each convolution its t, and whether it is mirrored: the correlation, that is, the sum over
            j of t[j] X[i + j].

    Returns:
        [n, m], row by row in memory if X is, else column by column.
    """
    n, m = X.shape
    dtype = torch.promote_types(factors[0][0].dtype, X.dtype)
    length = _fast_length(2 * n - 1)
    spectra = []
    for t, mirrored in factors:
        spectrum = torch.fft.rfft(t.to(wide(t)), length)
        spectra.append(spectrum.conj().resolve_conj() if mirrored else spectrum)
    # along contiguous rows: a transform along the columns of a matrix takes more than twice as long, and
    # torch transposes a whole matrix faster than its parts
    columns = X.T.contiguous()
    out = X.new_empty(m, n, dtype=dtype)
    step = max(1, CHUNK // length)
    for source, target in (
        zip(columns.split(step), out.split(step), strict=True) if X.numel() else ()
    ):
        rows = source.to(wide(X))
        for spectrum in spectra:
            product = torch.fft.rfft(rows, length).mul_(spectrum)
            rows = torch.fft.irfft(product, length)[:, :n]
        target.copy_(rows)
    return out.T.contiguous() if X.is_contiguous() else out.T


def _diagonal_sums(N: Tensor) -> Tensor:
    """The sums along the main diagonal of N, [n, n], and along those above it, [n]."""
    n = len(N)
    padded = torch.nn.functional.pad(N, (0, n))  # zeros where a shifted row would leave the matrix
    return padded.as_strided((n, n), (2 * n + 1, 1)).sum(0)


@cache
def _fast_length(n: int) -> int:
    """The smallest length of at least n that is 16 times a product of twos, threes and fives."""
    length = 16 * -(-n // 16)
    while True:
        rest = length
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return length
        length += 16
