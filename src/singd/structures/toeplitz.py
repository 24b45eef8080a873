"""Triangular Toeplitz matrices: products are truncated convolutions, by FFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from singd.structures.base import StructuredMatrix, wide

SMALL = 256
"""Up to this n a product with the n x n matrix itself is faster than one by FFT (measured, one thread)."""


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
        return _convolve(self.t[:, None], X.flip(0)).flip(0)

    def tmm(self, X: Tensor) -> Tensor:
        if self.n <= SMALL:
            return self.dense().T @ X
        return _convolve(self.t[:, None], X)

    def compose(self, other: UpperToeplitz) -> UpperToeplitz:
        return UpperToeplitz(_convolve(self.t[:, None], other.t[:, None])[:, 0])

    def project(self, Y: Tensor) -> UpperToeplitz:
        Y = Y.to(wide(Y))
        if self.n <= SMALL and Y.shape[1] > 2:
            sums = _diagonal_sums(Y @ Y.T)
        else:
            spectrum = torch.fft.rfft(Y, _fast_length(2 * self.n), dim=0)
            power = torch.view_as_real(spectrum).square().sum(dim=(1, 2))
            sums = torch.fft.irfft(power, _fast_length(2 * self.n))[: self.n]
        return self._means(sums)

    def gram(self) -> UpperToeplitz:
        # The j-th off-diagonal of A^T A sums to sum over s of (n - j - s) t[s] t[s + j]: two correlations.
        # They cancel for j near n, hence float64 (of vectors only), where the device has it.
        t = self.t.to(self.t.dtype if self.t.device.type == "mps" else torch.float64)
        length = _fast_length(2 * self.n)
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


def _convolve(t: Tensor, X: Tensor) -> Tensor:
    """The first n rows of the convolution of t, [n, 1], with each column of X, [n, m]."""
    n, dtype = len(X), torch.promote_types(t.dtype, X.dtype)
    length = _fast_length(2 * n)
    t, X = t.to(wide(t)), X.to(wide(X))
    product = torch.fft.rfft(t, length, dim=0) * torch.fft.rfft(X, length, dim=0)
    return torch.fft.irfft(product, length, dim=0)[:n].to(dtype)


def _diagonal_sums(N: Tensor) -> Tensor:
    """The sums along the main diagonal of N, [n, n], and along those above it, [n]."""
    n = len(N)
    padded = torch.nn.functional.pad(N, (0, n))  # zeros where a shifted row would leave the matrix
    return padded.as_strided((n, n), (2 * n + 1, 1)).sum(0)


def _fast_length(n: int) -> int:
    """The smallest power of two, or three times one, that is at least n."""
    power = 1 << (n - 1).bit_length()
    return 3 * power // 4 if power >= 4 and 3 * power // 4 >= n else power
