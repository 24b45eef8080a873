"""Triangular Toeplitz matrices: products are truncated convolutions, by FFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from singd.kernels import correlation, diagonal_sums, toeplitz, toeplitz_mm
from singd.precision import wide_dtype
from singd.structures.base import StructuredMatrix


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
        return toeplitz_mm(X, (self.t, True))

    def tmm(self, X: Tensor) -> Tensor:
        return toeplitz_mm(X, (self.t, False))

    def compose(self, other: UpperToeplitz) -> UpperToeplitz:
        return UpperToeplitz(toeplitz_mm(other.t[:, None], (self.t, False))[:, 0])

    def project(self, Y: Tensor) -> UpperToeplitz:
        sums = diagonal_sums(Y.to(wide_dtype(Y.dtype)))
        return self._means(sums, self._counts(sums))

    def trace(self) -> Tensor:
        return self.n * self.t[0].to(wide_dtype(self.t.dtype))

    # -- for speed -----------------------------------------------------------------------------------

    def add_identity_(self, alpha: float | Tensor) -> UpperToeplitz:
        self.t[:1].add_(alpha)
        return self

    def mm_AAt(self, X: Tensor) -> Tensor:
        return toeplitz_mm(X, (self.t, False), (self.t, True))

    def mm_AtA(self, X: Tensor) -> Tensor:
        return toeplitz_mm(X, (self.t, True), (self.t, False))

    def gram(self) -> UpperToeplitz:
        # The j-th off-diagonal of A^T A sums to sum over s of t[s] (n - j - s) t[s + j], a correlation.
        t = self.t.to(wide_dtype(self.t.dtype))
        counts = self._counts(t)
        return self._means(correlation(counts * t, t), counts)

    def cogram(self) -> UpperToeplitz:
        # A A^T is A^T A mirrored in its antidiagonal, which keeps each diagonal's sum.
        return self.gram()

    def dense(self) -> Tensor:
        return toeplitz(self.t, True)

    def _counts(self, like: Tensor) -> Tensor:
        """How many entries each diagonal has, [n], from the main one on."""
        return torch.arange(self.n, 0, -1, dtype=like.dtype, device=like.device)

    def _means(self, sums: Tensor, counts: Tensor) -> UpperToeplitz:
        """The projection of a matrix whose diagonals have these sums, [n], of so many entries."""
        means = sums / counts
        means[1:].mul_(2)
        return UpperToeplitz(means.to(self.t.dtype))
