r"""Diagonal matrices with some dense rows: all rank-k triangular and hierarchical structures.

.. math::
    K = \begin{pmatrix} A & B_1 & B_2 \\ 0 & D & 0 \\ 0 & F & G \end{pmatrix}

with a diagonal D; the first rows, [A, B1, B2], and the last ones, [F, G], are dense. Products of two such matrices
are such matrices, so that two products with few rows do what a dense factor does with n.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from singd.kernels import wide
from singd.rows import Rows
from singd.structures.base import Preconditioner, StructuredMatrix, Transposed, static


@dataclass(eq=False, repr=False)
class Bordered(StructuredMatrix):
    """A diagonal whose first and last rows are dense, the last ones only from the diagonal block A on.

    P(N) has the entries of N, twice where a block is not on the diagonal. All numbers are in one vector: the
    diagonal, the first rows, the last rows, none of them stored twice, and no zero.
    """

    numbers: Tensor  # [numel]
    size: int = static()  # n
    first: int = static()  # k: how many dense rows are at the top
    last: int = static()  # l: how many are at the bottom

    @classmethod
    def eye(cls, n: int, *, first: int = 0, last: int = 0, **kw: Any) -> Bordered:
        """The identity; a small n fills the first rows first, then the last, then the diagonal."""
        k = min(n, first)
        l = min(n - k, last)
        numbers = torch.zeros(n - k - l + k * n + l * (n - k), **kw)
        return cls(numbers, n, k, l).add_identity_(1.0)

    @property
    def n(self) -> int:
        return self.size

    # -- the parts of the vector ---------------------------------------------------------------------

    @property
    def _end(self) -> int:
        """Where the diagonal ends and the last rows begin."""
        return self.size - self.last

    @property
    def d(self) -> Tensor:
        """The diagonal D, [n - k - l]."""
        return self.numbers[: self._end - self.first]

    @property
    def top(self) -> Tensor:
        """The first rows, [k, n]."""
        start, k, n = self._end - self.first, self.first, self.size
        return self.numbers[start : start + k * n].view(k, n)

    @property
    def bottom(self) -> Tensor:
        """The last rows from column k on, [l, n - k]."""
        width = self.size - self.first
        return self.numbers[len(self.numbers) - self.last * width :].view(self.last, width)

    def _rows(self) -> Tensor:
        """The dense rows, R = [[A, B1, B2], [0, F, G]], [k + l, n]."""
        if not (self.first and self.last):
            return self.top if self.first else self.bottom
        return torch.cat([self.top, pad(self.bottom, (self.first, 0))])

    def _take(self, X: Tensor) -> Tensor:
        """The rows of X, [n, m], at the places of the dense rows, [k + l, m]."""
        if not (self.first and self.last):
            return X[: self.first] if self.first else X[self._end :]
        return torch.cat([X[: self.first], X[self._end :]])

    def _with(self, d: Tensor, top: Tensor, bottom: Tensor) -> Bordered:
        """The matrix of this structure with these parts, of the same shapes as its own."""
        numbers = torch.cat([d, top.reshape(-1), bottom.reshape(-1)])
        return Bordered(numbers, self.size, self.first, self.last)

    def _projected_from(self, d: Tensor, top: Tensor, bottom: Tensor) -> Bordered:
        """P(N) from these parts of N: twice what is off its diagonal blocks."""
        N = self._with(d, top, bottom)
        N.top[:, self.first :].mul_(2)
        N.bottom[:, : self._end - self.first].mul_(2)
        return N

    # -- the primitives ------------------------------------------------------------------------------

    def mm(self, X: Tensor) -> Tensor:
        k, rows = self.first, self._rows() @ X
        return torch.cat([rows[:k], self.d[:, None] * X[k : self._end], rows[k:]])

    def tmm(self, X: Tensor) -> Tensor:
        k, end = self.first, self._end
        if k:
            out = self.top.T @ X[:k]
            out[k:].addmm_(self.bottom.T, X[end:])
        else:
            out = self.bottom.T @ X[end:]
        out[k:end].addcmul_(self.d[:, None], X[k:end])
        return out

    def _left(self, S: Tensor) -> Tensor:
        """S K for S, [m, n]; or without the first k columns of both, where those of S are zero."""
        k, end = self.first, self._end
        if S.shape[1] == self.size and k:
            out = S[:, :k] @ self.top
            out[:, k:].addmm_(S[:, end:], self.bottom)
        else:
            k, end = 0, end - k
            out = S[:, end:] @ self.bottom
        out[:, k:end].addcmul_(S[:, k:end], self.d)
        return out

    def compose(self, other: Bordered) -> Bordered:
        return self._with(self.d * other.d, other._left(self.top), other._left(self.bottom))

    def project(self, Y: Tensor) -> Bordered:
        k, end = self.first, self._end
        squares = Y[k:end].square().sum(1)
        return self._projected_from(squares, Y[:k] @ Y.T, Y[end:] @ Y[k:].T)

    def trace(self) -> Tensor:
        dtype, k = wide(self.numbers), self.first
        diagonals = [self.d, self.top.diagonal(), self.bottom[:, self._end - k :].diagonal()]
        return torch.cat(diagonals).sum(dtype=dtype)

    # -- for speed -----------------------------------------------------------------------------------

    def add_identity_(self, alpha: float | Tensor) -> Bordered:
        self.d.add_(alpha)
        self.top.diagonal().add_(alpha)
        self.bottom[:, self._end - self.first :].diagonal().add_(alpha)
        return self

    def gram(self) -> Bordered:
        k, end, top, bottom = self.first, self._end, self.top, self.bottom
        middle = torch.cat([self.d[None], top[:, k:end], bottom[:, : end - k]])
        rows = bottom[:, end - k :].T @ bottom  # of K^T K, the last ones
        rows.addmm_(top[:, end:].T, top[:, k:])
        return self._projected_from(middle.square().sum(0), top[:, :k].T @ top, rows)

    def cogram(self) -> Bordered:
        k, N = self.first, self.mm(self._rows().T).T  # the dense rows of K K^T
        return self._projected_from(self.d.square(), N[:k], N[k:, k:])

    def mm_AAt(self, X: Tensor) -> Tensor:
        return self.preconditioner().mm_AAt(X)

    def mm_AAt_(self, X: Tensor) -> Tensor:
        return self.preconditioner().mm_AAt_(X)

    def mm_AtA(self, X: Tensor) -> Tensor:
        R, middle = self._rows(), slice(self.first, self._end)
        out = R.T @ (R @ X)
        out[middle].addcmul_(self.d.square()[:, None], X[middle])
        return out

    def preconditioner(self) -> Preconditioner:
        N = self.mm(
            self._rows().T
        ).T  # the rows of K K^T, whose others are diagonal but for their transposes
        d, k, end = pad(self.d.square(), (self.first, self.last))[:, None], self.first, self._end

        def multiply_(X: Tensor) -> Tensor:
            taken, rows = self._take(X).clone(), N @ X
            out = X.mul_(d).addmm_(N.T, taken)
            out[:k], out[end:] = rows[:k], rows[k:]
            return out

        return Preconditioner(lambda X: multiply_(X.clone()), self.dtype, multiply_)

    # K^T S K for S = R^T R needs few columns of S, and K S K^T few products with R: nothing of size m x n is
    # formed, which a convolution would have to unfold.

    def project_congruence(self, rows: Rows) -> Bordered:
        if not self._few_columns_pay:
            return super().project_congruence(rows)
        k, end, R = self.first, self._end, self._rows()
        columns = torch.cat([rows.columns(0, k), rows.columns(end, self.n)], dim=1)
        S = rows.tmm(columns).T  # the dense rows of R^T R
        SK = self._left(S)
        middle = torch.addcmul(SK[:, k:end], S[:, k:end], self.d)
        squares = self.d.square() * rows.squares()[k:end] + (R[:, k:end] * middle).sum(0)
        N = self._take(R.T) @ SK  # the dense rows of K^T S K
        return self._projected_from(squares, N[:k], N[k:, k:])

    def project_cocongruence(self, rows: Rows) -> Bordered:
        if not self._few_columns_pay:
            return super().project_cocongruence(rows)
        k = self.first
        N = self.mm(rows.tmm(rows.mm(self._rows().T))).T  # the dense rows of K S K^T
        squares = self.d.square() * rows.squares()[k : self._end]
        return self._projected_from(squares, N[:k], N[k:, k:])

    @property
    def _few_columns_pay(self) -> bool:
        """Whether products with few columns take less time than with all: on a CPU, which starts one cheaply."""
        return self.device.type == "cpu" and 2 * (self.first + self.last) < self.n


def from_recursive_layout(like: StructuredMatrix, flat: Tensor) -> Tensor:
    """The numbers of a factor in today's order, from the order of checkpoints of format 1.

    Those stored a bordered factor block by block: A, [B1, B2], the diagonal, and the transposes of F and of G. The
    numbers are the same, so that nothing is computed; those of all other structures are returned as they are.

    Args:
        like: A matrix of the factor's structure and size, on any device.
        flat: Its numbers in the old order, [numel].

    Returns:
        The numbers for ``like.from_flat``, [numel].
    """
    if not isinstance(like, Bordered):
        return from_recursive_layout(like.of, flat) if isinstance(like, Transposed) else flat
    n, k, l = like.size, like.first, like.last
    middle = n - k - l
    sizes = [k * k, k * (n - k), middle, middle * l, l * l]
    A, B, d, F, G = flat.split_with_sizes(sizes)
    top = torch.cat([A.view(k, k), B.view(k, n - k)], dim=1)
    bottom = torch.cat([F.view(middle, l), G.view(l, l)]).T
    return torch.cat([d, top.reshape(-1), bottom.reshape(-1)])
