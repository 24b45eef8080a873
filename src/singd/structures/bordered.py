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

from singd.precision import wide_dtype
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
        """The first rows, [A, B1, B2], [k, n]."""
        start, k, n = self._end - self.first, self.first, self.size
        return self.numbers[start : start + k * n].view(k, n)

    @property
    def bottom(self) -> Tensor:
        """The last rows from column k on, [F, G], [l, n - k]."""
        width = self.size - self.first
        return self.numbers[len(self.numbers) - self.last * width :].view(self.last, width)

    def _blocks(self) -> tuple[Tensor, ...]:
        """A, B1, B2, F, G."""
        k, end = self.first, self._end
        top, bottom = self.top.tensor_split((k, end), 1), self.bottom.tensor_split((end - k,), 1)
        return *top, *bottom

    def _rows(self) -> Tensor:
        """The dense rows, R = [[A, B1, B2], [0, F, G]], [k + l, n]."""
        return torch.cat([self.top, pad(self.bottom, (self.first, 0))])

    def _take(self, X: Tensor) -> Tensor:
        """The rows of X, [n, m], at the places of the dense rows, [k + l, m]."""
        return torch.cat([X[: self.first], X[self._end :]])

    def _empty(self, like: Tensor) -> Bordered:
        """One of the same sizes, to be written into."""
        return Bordered(like.new_empty(len(self.numbers)), self.size, self.first, self.last)

    def _doubled(self) -> Bordered:
        """P(N) in the place of these entries of N: twice what is off its diagonal blocks."""
        self.top[:, self.first :].mul_(2)
        self.bottom[:, : self._end - self.first].mul_(2)
        return self

    # -- the primitives ------------------------------------------------------------------------------

    def mm(self, X: Tensor) -> Tensor:
        k = self.first
        middle = self.d[:, None] * X[k : self._end]
        return torch.cat([self.top @ X, middle, self.bottom @ X[k:]])

    def tmm(self, X: Tensor) -> Tensor:
        k, end = self.first, self._end
        out = self.top.T @ X[:k]
        out[k:].addmm_(self.bottom.T, X[end:])
        out[k:end].addcmul_(self.d[:, None], X[k:end])
        return out

    def compose(self, other: Bordered) -> Bordered:
        k, end, M = self.first, self._end, self._empty(self.numbers)
        A, B1, B2, F, G = self._blocks()
        torch.mul(self.d, other.d, out=M.d)
        torch.mm(A, other.top, out=M.top)
        M.top[:, k:].addmm_(B2, other.bottom)
        M.top[:, k:end].addcmul_(B1, other.d)
        torch.mm(G, other.bottom, out=M.bottom)
        M.bottom[:, : end - k].addcmul_(F, other.d)
        return M

    def project(self, Y: Tensor) -> Bordered:
        k, end, N = self.first, self._end, self._empty(Y)
        torch.sum(Y[k:end].square(), 1, out=N.d)
        torch.mm(Y[:k], Y.T, out=N.top)
        torch.mm(Y[end:], Y[k:].T, out=N.bottom)
        return N._doubled()

    def trace(self) -> Tensor:
        A, _, _, _, G = self._blocks()
        diagonals = torch.cat([self.d, A.diagonal(), G.diagonal()])
        return diagonals.sum(dtype=wide_dtype(self.dtype))

    # -- for speed -----------------------------------------------------------------------------------

    def add_identity_(self, alpha: float | Tensor) -> Bordered:
        A, _, _, _, G = self._blocks()
        for diagonal in (self.d, A.diagonal(), G.diagonal()):
            diagonal.add_(alpha)
        return self

    def gram(self) -> Bordered:
        N, (A, B1, B2, F, G) = self._empty(self.numbers), self._blocks()
        torch.sum(torch.cat([self.d[None], B1, F]).square(), 0, out=N.d)
        torch.mm(A.T, self.top, out=N.top)
        torch.mm(B2.T, self.top[:, self.first :], out=N.bottom)
        N.bottom.addmm_(G.T, self.bottom)
        return N._doubled()

    def cogram(self) -> Bordered:
        N, (_, B1, _, F, _) = self._empty(self.numbers), self._blocks()
        NA, NB1, NB2, NF, NG = N._blocks()
        torch.square(self.d, out=N.d)
        torch.mm(self.top, self.top.T, out=NA)
        torch.mul(B1, self.d, out=NB1)
        torch.mm(self.top[:, self.first :], self.bottom.T, out=NB2)
        torch.mul(F, self.d, out=NF)
        torch.mm(self.bottom, self.bottom.T, out=NG)
        return N._doubled()

    def mm_AAt(self, X: Tensor) -> Tensor:
        return self.preconditioner().mm_AAt(X)

    def mm_AtA(self, X: Tensor) -> Tensor:
        R, middle = self._rows(), slice(self.first, self._end)
        out = R.T @ (R @ X)
        out[middle].addcmul_(self.d.square()[:, None], X[middle])
        return out

    def preconditioner(self) -> Preconditioner:
        # the dense rows of K K^T; the others are their transposes, and diagonal
        N = self.mm(self._rows().T).T
        d, k, end = pad(self.d.square(), (self.first, self.last))[:, None], self.first, self._end

        def multiply(X: Tensor) -> Tensor:
            rows, out = N @ X, (d * X).addmm_(N.T, self._take(X))
            out[:k], out[end:] = rows[:k], rows[k:]
            return out

        return Preconditioner(multiply, self.dtype)

    # K^T S K for S = R^T R needs few columns of S, and K S K^T few products with R: nothing of size m x n is
    # formed, which a convolution would have to unfold.

    def project_congruence(self, rows: Rows) -> Bordered:
        if not self._few_columns_pay:
            return super().project_congruence(rows)
        middle, R = slice(self.first, self._end), self._rows()
        columns = [rows.columns(0, self.first), rows.columns(self._end, self.n)]
        S = rows.tmm(torch.cat(columns, dim=1))  # S at the dense rows, [n, k + l]
        KS = self.tmm(S)
        both = torch.addcmul(KS[middle], S[middle], self.d[:, None])
        squares = self.d.square() * rows.squares()[middle] + (R[:, middle].T * both).sum(1)
        return self._packed(squares, self._take(R.T) @ KS.T)

    def project_cocongruence(self, rows: Rows) -> Bordered:
        if not self._few_columns_pay:
            return super().project_cocongruence(rows)
        N = self.mm(rows.tmm(rows.mm(self._rows().T))).T
        return self._packed(self.d.square() * rows.squares()[self.first : self._end], N)

    def _packed(self, diagonal: Tensor, N: Tensor) -> Bordered:
        """P(N) from the middle of its diagonal and from its dense rows, [k + l, n]."""
        P, k = self._empty(N), self.first
        P.d.copy_(diagonal)
        P.top.copy_(N[:k])
        P.bottom.copy_(N[k:, k:])
        return P._doubled()

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
