"""A structure that a user adds: circulant matrices, whose products are circular convolutions."""

from dataclasses import dataclass

import torch
from torch import Tensor

from singd import StructuredMatrix


def spectrum(X: Tensor) -> Tensor:
    return torch.fft.rfft(X.to(torch.promote_types(X.dtype, torch.float32)), dim=0)


@dataclass(eq=False, repr=False)
class Circulant(StructuredMatrix):
    """A[i, j] = c[(i - j) mod n]."""

    c: Tensor  # [n], the first column

    @classmethod
    def eye(cls, n, **kw):
        return cls(torch.eye(n, 1, **kw)[:, 0])

    @property
    def n(self):
        return len(self.c)

    def mm(self, X):
        return torch.fft.irfft(spectrum(self.c)[:, None] * spectrum(X), self.n, dim=0).to(X.dtype)

    def tmm(self, X):
        return torch.fft.irfft(spectrum(self.c).conj()[:, None] * spectrum(X), self.n, dim=0).to(
            X.dtype
        )

    def compose(self, other):
        return Circulant(self.mm(other.c[:, None])[:, 0])

    def project(self, Y):  # the mean along each wrapped diagonal of Y Y^T
        power = spectrum(Y).abs().square().sum(1)
        return Circulant((torch.fft.irfft(power, self.n) / self.n).to(Y.dtype))

    def trace(self):
        return self.n * self.c[0].to(torch.promote_types(self.c.dtype, torch.float32))
