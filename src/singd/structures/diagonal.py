"""Diagonal matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from singd.precision import wide_dtype
from singd.rows import Rows
from singd.structures.base import StructuredMatrix


@dataclass(eq=False, repr=False)
class Diagonal(StructuredMatrix):
    """P(N) = the diagonal of N."""

    d: Tensor  # [n]

    batched = True

    @classmethod
    def eye(cls, n: int, **kw: Any) -> Diagonal:
        return cls(torch.ones(n, **kw))

    @property
    def n(self) -> int:
        return self.d.shape[0]

    def mm(self, X: Tensor) -> Tensor:
        return self.d[:, None] * X

    tmm = mm

    def compose(self, other: Diagonal) -> Diagonal:
        return Diagonal(self.d * other.d)

    def project(self, Y: Tensor) -> Diagonal:
        return Diagonal(Y.square().sum(1))

    def trace(self) -> Tensor:
        return self.d.sum(dtype=wide_dtype(self.d.dtype))

    # -- for speed -----------------------------------------------------------------------------------

    def add_identity_(self, alpha: float | Tensor) -> Diagonal:
        self.d.add_(alpha)
        return self

    def mm_AAt(self, X: Tensor) -> Tensor:
        return self.d.square()[:, None] * X

    def mm_AAt_(self, X: Tensor) -> Tensor:
        return X.mul_(self.d.square()[:, None])

    def spectral_norm(self, products: int = 8) -> Tensor:
        # exact, however many products there are
        return self.max_abs().to(wide_dtype(self.dtype))

    def gram(self) -> Diagonal:
        return Diagonal(self.d.square())

    cogram = gram

    def project_congruence(self, rows: Rows) -> Diagonal:
        return Diagonal(self.d.square() * rows.squares())

    project_cocongruence = project_congruence
