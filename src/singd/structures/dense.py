"""Dense matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from singd.structures.base import RowsLike, StructuredMatrix, wide


@dataclass(eq=False)
class DenseProduct:
    """A A^T of a dense A, formed once for many products: half their cost, for n^2 more numbers."""

    product: Tensor  # [n, n]

    @property
    def dtype(self) -> torch.dtype:
        return self.product.dtype

    def outer(self, X: Tensor) -> Tensor:
        """A A^T X for a dense X, [n, m]."""
        return self.product @ X


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
        return self.a @ X

    def tmm(self, X: Tensor) -> Tensor:
        return self.a.T @ X

    def compose(self, other: Dense) -> Dense:
        return Dense(self.a @ other.a)

    def project(self, Y: Tensor) -> Dense:
        return Dense(Y @ Y.T)

    def project_pair(self, V: Tensor, W: Tensor) -> Dense:
        N = V @ W.T
        return Dense(N + N.T)

    def trace(self) -> Tensor:
        return self.a.diagonal().sum(dtype=wide(self.a))

    def add_identity_(self, alpha: float | Tensor) -> Dense:
        self.a.diagonal().add_(alpha)
        return self

    def outer(self, X: Tensor) -> Tensor:
        if X.shape[1] > self.n:  # one product with the wide X instead of two
            return (self.a @ self.a.T) @ X
        return self.a @ (self.a.T @ X)

    def gram(self) -> Dense:
        return Dense(self.a.T @ self.a)

    def cogram(self) -> Dense:
        return Dense(self.a @ self.a.T)

    def sandwich(self, rows: RowsLike) -> Dense:
        if rows.count <= 2 * self.n:
            return self.project(self.a.T @ rows.matrix().T)  # 2 m n^2 multiplications
        return Dense(
            self.a.T @ (rows.gram() @ self.a)
        )  # m n^2 + 2 n^3, or less where rows are lazy

    def co_sandwich(self, rows: RowsLike) -> Dense:
        return Dense(self.a.T).sandwich(rows)

    def dense(self) -> Tensor:
        return self.a

    def norm(self) -> Tensor:
        return torch.linalg.vector_norm(self.a, dtype=wide(self.a))
