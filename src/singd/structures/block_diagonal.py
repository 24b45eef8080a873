"""Block-diagonal matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from singd.precision import wide_dtype
from singd.rows import Rows
from singd.structures.base import Preconditioner, StructuredMatrix

LARGE = 2**14
"""How many numbers a matrix has at least that copying a product of it takes longer than starting an operator."""

WIDE = 2**15
"""How many numbers the rows of a block have at least that the layout of X counts more than a product for each."""


@dataclass(eq=False, repr=False)
class BlockDiagonal(StructuredMatrix):
    """Dense k x k blocks on the diagonal, the last one smaller; P(N) = the blocks of N."""

    blocks: Tensor  # [n // k, k, k]
    last: Tensor  # [n % k, n % k]

    batched = True

    @classmethod
    def eye(cls, n: int, *, k: int = 30, **kw: Any) -> BlockDiagonal:
        whole, rest = divmod(n, k)
        return cls(torch.eye(k, **kw).repeat(whole, 1, 1), torch.eye(rest, **kw))

    @property
    def n(self) -> int:
        return self.blocks.shape[0] * self.blocks.shape[1] + self.last.shape[0]

    def _split(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """The rows that meet whole blocks, [n // k, k, m], and the rest, [n % k, m]."""
        whole, k, _ = self.blocks.shape
        return X[: whole * k].unflatten(0, (whole, k)), X[whole * k :]

    def mm(self, X: Tensor) -> Tensor:
        return self._times(self.blocks, self.last, X)

    def tmm(self, X: Tensor) -> Tensor:
        return self._times(self.blocks.mT, self.last.T, X)

    def _times(self, blocks: Tensor, last: Tensor, X: Tensor) -> Tensor:
        """diag(blocks, last) X."""
        if not len(blocks):
            return last @ X
        top, bottom = self._split(X)
        if torch.is_grad_enabled() or X.numel() < LARGE:  # (autograd writes into no given memory)
            return torch.cat([(blocks @ top).flatten(0, 1), last @ bottom])
        # Both products into one place, instead of a copy of them. By rows, torch multiplies all blocks at once.
        # Large ones are better off in the layout of X: that of a gradient's transpose, so that a weight, which
        # is stored by rows, will not be met column by column.
        out = torch.empty_like(X) if top[0].numel() >= WIDE else X.new_empty(X.shape)
        head, tail = self._split(out)
        torch.bmm(blocks, top, out=head)
        torch.mm(last, bottom, out=tail)
        return out

    def compose(self, other: BlockDiagonal) -> BlockDiagonal:
        return BlockDiagonal(self.blocks @ other.blocks, self.last @ other.last)

    def project(self, Y: Tensor) -> BlockDiagonal:
        top, bottom = self._split(Y)
        return BlockDiagonal(top @ top.mT, bottom @ bottom.T)

    def trace(self) -> Tensor:
        dtype = wide_dtype(self.last.dtype)
        whole = self.blocks.diagonal(dim1=1, dim2=2).sum(dtype=dtype)
        return whole + self.last.diagonal().sum(dtype=dtype)

    # -- for speed -----------------------------------------------------------------------------------

    def preconditioner(self) -> Preconditioner:
        return Preconditioner(self.cogram().mm, self.last.dtype)

    def mm_AAt(self, X: Tensor) -> Tensor:
        if X.shape[1] < self.blocks.shape[1]:
            return self.mm(self.tmm(X))
        return self.cogram().mm(X)  # one pass over X instead of two

    def add_identity_(self, alpha: float | Tensor) -> BlockDiagonal:
        self.blocks.diagonal(dim1=1, dim2=2).add_(alpha)
        self.last.diagonal().add_(alpha)
        return self

    def gram(self) -> BlockDiagonal:
        return BlockDiagonal(self.blocks.mT @ self.blocks, self.last.T @ self.last)

    def cogram(self) -> BlockDiagonal:
        return BlockDiagonal(self.blocks @ self.blocks.mT, self.last @ self.last.T)

    def project_congruence(self, rows: Rows) -> BlockDiagonal:
        S, S_last = rows.block_gram(self.blocks.shape[1])
        return BlockDiagonal(self.blocks.mT @ S @ self.blocks, self.last.T @ S_last @ self.last)

    def project_cocongruence(self, rows: Rows) -> BlockDiagonal:
        return BlockDiagonal(self.blocks.mT, self.last.T).project_congruence(rows)
