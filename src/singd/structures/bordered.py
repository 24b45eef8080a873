r"""Diagonal matrices with some dense rows: all rank-k triangular and hierarchical structures.

.. math::
    K = \begin{pmatrix} A & B_1 & B_2 \\ 0 & D & 0 \\ 0 & F & G \end{pmatrix}

with a diagonal D; the first rows, [A, B1, B2], and the last ones, [F, G], are dense. Products of two such matrices
are such matrices, so that two products with few rows do what a dense factor does with n.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from singd.kernels import few_columns_pay, wide
from singd.rows import Rows
from singd.structures.base import Preconditioner, StructuredMatrix, static, transposed


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
        """The rows of X, [n, m], that meet dense columns of K^T: the first and the last ones, [k + l, m]."""
        if not (self.first and self.last):
            return X[: self.first] if self.first else X[self._end :]
        return torch.cat([X[: self.first], X[self._end :]])

    def _with(self, d: Tensor, rows: Tensor) -> Bordered:
        """The matrix with this diagonal, [n - k - l], and these dense rows, [k + l, n]."""
        k = self.first
        numbers = torch.cat([d, rows[:k].reshape(-1), rows[k:, k:].reshape(-1)])
        return Bordered(numbers, self.size, k, self.last)

    def _member(self, d: Tensor, rows: Tensor) -> Bordered:
        """P(N) from N's diagonal between the dense rows, and N's rows: twice what is off the diagonal blocks."""
        N = self._with(d, rows)
        if self.first:
            N.top[:, self.first :].mul_(2)
        if self.last:
            N.bottom[:, : -self.last].mul_(2)
        return N

    # -- the primitives ------------------------------------------------------------------------------

    def mm(self, X: Tensor) -> Tensor:
        k, rows = self.first, self._rows() @ X
        return torch.cat([rows[:k], self.d[:, None] * X[k : self._end], rows[k:]])

    def tmm(self, X: Tensor) -> Tensor:
        out, middle = self._rows().T @ self._take(X), slice(self.first, self._end)
        out[middle].addcmul_(self.d[:, None], X[middle])
        return out

    def compose(self, other: Bordered) -> Bordered:
        # rows times a matrix, as its transpose times columns
        return self._with(self.d * other.d, other.tmm(self._rows().T).T)

    def project(self, Y: Tensor) -> Bordered:
        squares = Y[self.first : self._end].square().sum(1)
        return self._member(squares, self._take(Y) @ Y.T)

    def trace(self) -> Tensor:
        dtype, k = wide(self.numbers), self.first
        blocks = self.top[:, :k], self.bottom[:, self._end - k :]
        return self.d.sum(dtype=dtype) + sum(b.diagonal().sum(dtype=dtype) for b in blocks)

    # -- for speed -----------------------------------------------------------------------------------

    def project_pair(self, V: Tensor, W: Tensor) -> Bordered:
        products = 2 * (V * W)[self.first : self._end].sum(1)
        return self._member(products, self._take(V) @ W.T + self._take(W) @ V.T)

    def add_identity_(self, alpha: float | Tensor) -> Bordered:
        self.d.add_(alpha)
        if self.first:
            self.top.diagonal().add_(alpha)
        if self.last:
            self.bottom[:, -self.last :].diagonal().add_(alpha)
        return self

    def gram(self) -> Bordered:
        R = self._rows()
        return self._congruence(self.d.square(), R, R[:, self.first : self._end])

    def _congruence(self, squares: Tensor, SK: Tensor, middle: Tensor) -> Bordered:
        """P(K^T S K), with E the columns of I at the places of the dense rows.

        Args:
            squares: d^2 times the diagonal of S, [n - k - l].
            SK: E^T S K, [k + l, n].
            middle: E^T S (K + D) between the dense columns, [k + l, n - k - l].
        """
        k, end, R = self.first, self._end, self._rows()
        return self._member(squares + (R[:, k:end] * middle).sum(0), self._take(R.T) @ SK)

    def cogram(self) -> Bordered:
        return self._member(self.d.square(), self.mm(self._rows().T).T)

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

    def mm_AtA(self, X: Tensor) -> Tensor:
        R, middle = self._rows(), slice(self.first, self._end)
        out = R.T @ (R @ X)
        out[middle].addcmul_(self.d.square()[:, None], X[middle])
        return out

    # K^T S K for S = R^T R needs few columns of S, and K S K^T few products with R: nothing of size m x n is
    # formed, which a convolution would have to unfold.

    def project_congruence(self, rows: Rows) -> Bordered:
        if not few_columns_pay(self.numbers):
            return super().project_congruence(rows)
        k, end = self.first, self._end
        if self._wide:
            whole = rows.gram()
            S, squares = self._take(whole), whole.diagonal()
        else:
            columns = torch.cat([rows.columns(0, k), rows.columns(end, self.n)], dim=1)
            S, squares = rows.tmm(columns).T, rows.squares()
        SK = self.tmm(S.T).T
        middle = torch.addcmul(SK[:, k:end], S[:, k:end], self.d)
        return self._congruence(self.d.square() * squares[k:end], SK, middle)

    def project_cocongruence(self, rows: Rows) -> Bordered:
        if not few_columns_pay(self.numbers):
            return super().project_cocongruence(rows)
        R = self._rows()
        if self._wide:
            whole = rows.gram()
            S, squares = R @ whole, whole.diagonal()
        else:
            S, squares = rows.tmm(rows.mm(R.T)).T, rows.squares()
        squares = squares[self.first : self._end]
        return self._member(self.d.square() * squares, self.mm(S.T).T)

    @property
    def _wide(self) -> bool:
        """Whether so many rows are dense that all of R^T R takes less time than their part."""
        return 2 * (self.first + self.last) >= self.n


def hierarchical(first: int, last: int) -> Callable[..., StructuredMatrix]:
    """Dense corners, joined by borders and a diagonal."""
    return partial(Bordered.eye, first=first, last=last)


def upper_first(k: int) -> Callable[..., StructuredMatrix]:
    """[[A, B], [0, diag]] with a k x k dense A."""
    return partial(Bordered.eye, first=k)


def lower_last(k: int) -> Callable[..., StructuredMatrix]:
    """[[diag, 0], [F, G]] with a k x k dense G."""
    return partial(Bordered.eye, last=k)


def lower_first(k: int) -> Callable[..., StructuredMatrix]:
    """The transposes of ``upper_first``."""
    return transposed(upper_first(k))


def upper_last(k: int) -> Callable[..., StructuredMatrix]:
    """The transposes of ``lower_last``."""
    return transposed(lower_last(k))


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
        inner = [getattr(like, f.name) for f in fields(like)]
        if not any(isinstance(A, StructuredMatrix) for A in inner):
            return flat
        stored = [A for A in inner if isinstance(A, StructuredMatrix | Tensor)]
        sizes = [A.numel if isinstance(A, StructuredMatrix) else A.numel() for A in stored]
        parts = zip(stored, flat.split_with_sizes(sizes), strict=True)
        return torch.cat(
            [
                from_recursive_layout(A, p) if isinstance(A, StructuredMatrix) else p
                for A, p in parts
            ]
        )
    n, k, l = like.size, like.first, like.last
    middle = n - k - l
    sizes = [k * k, k * (n - k), middle, middle * l, l * l]
    A, B, d, F, G = flat.split_with_sizes(sizes)
    top = torch.cat([A.view(k, k), B.view(k, n - k)], dim=1)
    bottom = torch.cat([F.view(middle, l), G.view(l, l)]).T
    return torch.cat([d, top.reshape(-1), bottom.reshape(-1)])
