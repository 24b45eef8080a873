"""Dense matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from singd.kernels import matmul, matmul_symmetric
from singd.precision import wide_dtype
from singd.rows import Rows
from singd.structures.base import Preconditioner, StructuredMatrix


@dataclass(eq=False, repr=False)
class Dense(StructuredMatrix):
    """All matrices; P(N) = N."""

    a: Tensor  # [n, n]

    batched = True

    @classmethod
    def eye(cls, n: int, **kw: Any) -> Dense:
        return cls(torch.eye(n, **kw))

    @property
    def n(self) -> int:
        return self.a.shape[0]

    def mm(self, X: Tensor) -> Tensor:
        return matmul(self.a, X)

    def tmm(self, X: Tensor) -> Tensor:
        return matmul(self.a.T, X)

    def compose(self, other: Dense) -> Dense:
        return Dense(matmul(self.a, other.a))

    def project(self, Y: Tensor) -> Dense:
        return Dense(matmul_symmetric(Y, Y.T))

    def trace(self) -> Tensor:
        return self.a.diagonal().sum(dtype=wide_dtype(self.a.dtype))

    # -- for speed -----------------------------------------------------------------------------------

    def add_identity_(self, alpha: float | Tensor) -> Dense:
        self.a.diagonal().add_(alpha)
        return self

    def mm_AAt(self, X: Tensor) -> Tensor:
        # One product with a wide X instead of two, as A A^T itself costs half of the second.
        return self.project(self.a).mm(X) if 2 * X.shape[1] > self.n else self.mm(self.tmm(X))

    def preconditioner(self) -> Preconditioner:
        kept = Dense(self.project(self.a).a.contiguous())  # without the room behind its rows
        return Preconditioner(kept.mm, self.dtype)

    def gram(self) -> Dense:
        return Dense(matmul_symmetric(self.a.T, self.a))

    def project_congruence(self, rows: Rows) -> Dense:
        # Rows first takes m n^2 more multiplications, R^T R first n^3 (with halves).
        if rows.count <= self.n:
            return self.project(self.tmm(rows.matrix().T))
        return Dense(matmul_symmetric(self.a.T, matmul(rows.gram(), self.a)))

    def project_cocongruence(self, rows: Rows) -> Dense:
        return Dense(self.a.T).project_congruence(rows)

    def dense(self) -> Tensor:
        return self.a

    def norm(self) -> Tensor:
        return torch.linalg.vector_norm(self.a, dtype=wide_dtype(self.a.dtype))
