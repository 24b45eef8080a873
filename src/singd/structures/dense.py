"""Dense matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from singd.products import halving_pays, multiply, symmetric
from singd.structures.base import OuterProduct, RowsLike, StructuredMatrix, wide
from singd.structures.border import Border
from singd.structures.congruence import Congruence


@dataclass(eq=False, repr=False)
class Dense(StructuredMatrix):
    """All matrices; P(N) = N."""

    a: Tensor  # [n, n]

    @classmethod
    def eye(cls, n: int, **kw: Any) -> Dense:
        return cls(torch.eye(n, **kw))

    @property
    def n(self) -> int:
        return self.a.shape[0]

    def mm(self, X: Tensor) -> Tensor:
        return multiply(self.a, X)

    def tmm(self, X: Tensor) -> Tensor:
        return multiply(self.a.T, X)

    def compose(self, other: Dense) -> Dense:
        return Dense(multiply(self.a, other.a))

    def project(self, Y: Tensor) -> Dense:
        return Dense(symmetric(Y, Y.T))

    def project_pair(self, V: Tensor, W: Tensor) -> Dense:
        N = V @ W.T
        return Dense(N + N.T)

    def trace(self) -> Tensor:
        return self.a.diagonal().sum(dtype=wide(self.a))

    def add_identity_(self, alpha: float | Tensor) -> Dense:
        self.a.diagonal().add_(alpha)
        return self

    def outer(self, X: Tensor) -> Tensor:
        # One product with a wide X instead of two, if A A^T itself costs less than the second.
        cost = self.n / 2 if halving_pays(self.n, self.n, X.device) else self.n
        if X.shape[1] > cost:
            return multiply(symmetric(self.a, self.a.T), X)
        return self.mm(self.tmm(X))

    def gram(self) -> Dense:
        return Dense(symmetric(self.a.T, self.a))

    def cogram(self) -> Dense:
        return Dense(symmetric(self.a, self.a.T))

    def sandwich(self, rows: RowsLike) -> Dense:
        return self.curvature(rows).formed()

    def curvature(self, rows: RowsLike) -> Dense | Congruence:
        # Rows first takes m n^2 more multiplications, A^T A first n^3 (with halves, and K^T K formed along).
        if 0 < rows.count <= self.n:  # (of no rows it is zero in any form, and changes no sum)
            return self.project(self.tmm(rows.matrix().T))
        return Congruence(self, multiply(rows.gram(), self.a))

    def gram_beside(self, H: Dense | Congruence) -> Dense | Congruence:
        return Congruence(self, self.a) if isinstance(H, Congruence) else self.gram()

    def co_sandwich(self, rows: RowsLike) -> Dense:
        return Dense(self.a.T).sandwich(rows)

    def dense(self) -> Tensor:
        return self.a

    def outer_product(self) -> OuterProduct:
        kept = Dense(self.cogram().a.contiguous())  # without the room behind its rows
        return OuterProduct(kept.mm, self.dtype)

    def border(self, transposed: bool = False) -> Border:
        rows = self.a.T if transposed else self.a
        return Border(self.a.new_zeros(self.n), rows, [(0, self.n)])

    def with_border(self, border: Border, transposed: bool, off: float = 1.0) -> Dense:
        return Dense(border.R.T if transposed else border.R)

    def norm(self) -> Tensor:
        return torch.linalg.vector_norm(self.a, dtype=wide(self.a))
