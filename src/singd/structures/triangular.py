"""Block-triangular matrices: rank-k triangular and hierarchical ones, from one combinator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from singd.structures.base import OuterProduct, RowsLike, StructuredMatrix, Transposed
from singd.structures.border import Border
from singd.structures.dense import Dense
from singd.structures.diagonal import Diagonal


@dataclass(eq=False, repr=False)
class Upper(StructuredMatrix):
    """[[A, B], [0, D]] with structured A and D and a dense B.

    P(N) = [[P(N11), 2 N12], [0, P(N22)]]. Where it is a diagonal with a border of rows (or its transpose is),
    that form is used, else recursion over the blocks.
    """

    A: StructuredMatrix  # k x k
    B: Tensor  # [k, n - k]
    D: StructuredMatrix  # (n - k) x (n - k)

    @classmethod
    def eye(
        cls,
        n: int,
        *,
        first: Callable[..., StructuredMatrix] = Dense.eye,
        second: Callable[..., StructuredMatrix] = Diagonal.eye,
        k: int = 1,
        **kw: Any,
    ) -> Upper:
        """The identity; ``k`` is the size of A, or if negative minus that of D, as far as n allows."""
        k = min(n, k) if k >= 0 else max(0, n + k)
        return cls(first(k, **kw), torch.zeros(k, n - k, **kw), second(n - k, **kw))

    @property
    def n(self) -> int:
        return self.A.n + self.D.n

    def _split(self, X: Tensor) -> tuple[Tensor, Tensor]:
        return X[: self.A.n], X[self.A.n :]

    def mm(self, X: Tensor) -> Tensor:
        top, bottom = self._split(X)
        return torch.cat([self.A.mm(top) + self.B @ bottom, self.D.mm(bottom)])

    def tmm(self, X: Tensor) -> Tensor:
        top, bottom = self._split(X)
        return torch.cat([self.A.tmm(top), self.B.T @ top + self.D.tmm(bottom)])

    def border(self, transposed: bool = False) -> Border | None:
        k, n = self.A.n, self.n
        # the block whose rows are dense, and the one that may have a border of its own
        whole, part = (self.D, self.A) if transposed else (self.A, self.D)
        inner = part.border(transposed) if isinstance(whole, Dense) else None
        if inner is None:
            return None
        zeros = self.B.new_zeros(whole.n)
        R = self.B.new_zeros(whole.n + len(inner.R), n)
        if transposed:  # [[A^T, 0], [B^T, D^T]]
            R[: -whole.n or None, :k] = inner.R
            R[len(inner.R) :] = torch.cat([self.B, self.D.dense()]).T
            return Border(torch.cat([inner.d, zeros]), R, [*inner.places, (k, n)])
        torch.cat([self.A.dense(), self.B], dim=1, out=R[:k])
        R[k:, k:] = inner.R
        places = [(0, k), *((k + start, k + stop) for start, stop in inner.places)]
        return Border(torch.cat([zeros, inner.d]), R, places)

    def with_border(self, border: Border, transposed: bool, off: float = 1.0) -> Upper:
        k = self.A.n
        if transposed:
            r = len(border.R) - self.D.n
            inner = Border(border.d[:k], border.R[:r, :k], border.places[:-1])
            B, D = border.R[r:, :k].T, Dense(border.R[r:, k:].T)
            return Upper(self.A.with_border(inner, transposed, off), _times(B, off), D)
        places = [(start - k, stop - k) for start, stop in border.places[1:]]
        inner = Border(border.d[k:], border.R[k:, k:], places)
        A, B = Dense(border.R[:k, :k]), border.R[:k, k:]
        return Upper(A, _times(B, off), self.D.with_border(inner, transposed, off))

    def _form(self) -> tuple[Border | None, bool]:
        """This matrix' border form, or else its transpose's; and whether it is the transpose's."""
        form = self.border()
        return (form, False) if form is not None else (self.border(transposed=True), True)

    def compose(self, other: Upper) -> Upper:
        (form, transposed), (theirs, _) = self._form(), other._form()
        if form is not None and theirs is not None:
            product = theirs.compose(form) if transposed else form.compose(theirs)
            return self.with_border(product, transposed)
        B = self.A.mm(other.B) + other.D.tmm(self.B.T).T
        return Upper(self.A.compose(other.A), B, self.D.compose(other.D))

    def project(self, Y: Tensor) -> Upper:
        top, bottom = self._split(Y)
        return Upper(self.A.project(top), 2 * (top @ bottom.T), self.D.project(bottom))

    def project_pair(self, V: Tensor, W: Tensor) -> Upper:
        (V1, V2), (W1, W2) = self._split(V), self._split(W)
        B = 2 * (V1 @ W2.T + W1 @ V2.T)
        return Upper(self.A.project_pair(V1, W1), B, self.D.project_pair(V2, W2))

    def trace(self) -> Tensor:
        return self.A.trace() + self.D.trace()

    def outer(self, X: Tensor) -> Tensor:
        form, transposed = self._form()
        if form is not None:
            return form.co_outer(X) if transposed else form.outer(X)
        top, bottom = self._split(X)
        z = self.D.tmm(bottom).addmm_(self.B.T, top)  # the lower part of A^T X
        upper = self.A.mm(self.A.tmm(top)).addmm_(self.B, z)
        return torch.cat([upper, self.D.mm(z)])

    def outer_product(self) -> OuterProduct | None:
        return self._border_product()

    def co_outer(self, X: Tensor) -> Tensor:
        form, transposed = self._form()
        if form is not None:
            return form.outer(X) if transposed else form.co_outer(X)
        top, bottom = self._split(X)
        z = self.A.mm(top).addmm_(self.B, bottom)  # the upper part of A X
        lower = self.D.tmm(self.D.mm(bottom)).addmm_(self.B.T, z)
        return torch.cat([self.A.tmm(z), lower])

    # A^T S A and A S A^T for S = R^T R need few columns of S or few products with R: whichever of
    # the two diagonal blocks is the small one decides, and nothing of size n x n is formed.

    def sandwich(self, rows: RowsLike) -> Upper:
        form, transposed = self._form()
        if form is not None:
            N = form.co_sandwich(rows) if transposed else form.sandwich(rows)
            return self.with_border(N, transposed, off=2.0)
        k, n = self.A.n, self.n
        R1, R2 = rows.narrow(0, k), rows.narrow(k, n)
        if n - k < k:  # Y = R1 B + R2 D is narrow
            Y = R1.mm(self.B) + self.D.tmm(R2.matrix().T).T
            return Upper(self.A.sandwich(R1), 2 * self.A.tmm(R1.tmm(Y)), self.D.project(Y.T))
        # the lower right is D^T S22 D + V^T W + W^T V with V = B, W = X - S11 B / 2
        S = rows.tmm(R1.matrix())  # [n, k]
        S11B = S[:k] @ self.B
        X = S11B + self.D.tmm(S[k:]).T
        second = self.D.sandwich(R2).add_(self.D.project_pair(self.B.T, (X - S11B / 2).T))
        return Upper(self.A.sandwich(R1), 2 * self.A.tmm(X), second)

    def co_sandwich(self, rows: RowsLike) -> Upper:
        form, transposed = self._form()
        if form is not None:
            N = form.sandwich(rows) if transposed else form.co_sandwich(rows)
            return self.with_border(N, transposed, off=2.0)
        k, n = self.A.n, self.n
        R1, R2 = rows.narrow(0, k), rows.narrow(k, n)
        if k < n - k:  # Y = R1 A^T + R2 B^T is narrow
            Y = self.A.mm(R1.matrix().T).T + R2.mm(self.B.T)
            second = self.D.co_sandwich(R2)
            return Upper(self.A.project(Y.T), 2 * self.D.mm(R2.tmm(Y)).T, second)
        # the upper left is A S11 A^T + V^T W + W^T V with V = B^T, W = X - S22 B^T / 2
        S = rows.tmm(R2.matrix())  # [n, n - k]
        S22B = S[k:] @ self.B.T
        X = self.A.mm(S[:k]).T + S22B
        first = self.A.co_sandwich(R1).add_(self.A.project_pair(self.B, (X - S22B / 2).T))
        return Upper(first, 2 * self.D.mm(X).T, self.D.co_sandwich(R2))

    def add_identity_(self, alpha: float | Tensor) -> Upper:
        self.A.add_identity_(alpha)
        self.D.add_identity_(alpha)
        return self

    def gram(self) -> Upper:
        form, transposed = self._form()
        if form is not None:
            N = form.cogram() if transposed else form.gram()
            return self.with_border(N, transposed, off=2.0)
        # A^T A = [[A^T A, A^T B], [., B^T B + D^T D]]
        return Upper(
            self.A.gram(), 2 * self.A.tmm(self.B), self.D.gram() + self.D.project(self.B.T)
        )

    def cogram(self) -> Upper:
        form, transposed = self._form()
        if form is not None:
            N = form.gram() if transposed else form.cogram()
            return self.with_border(N, transposed, off=2.0)
        # A A^T = [[A A^T + B B^T, B D^T], [., D D^T]]
        return Upper(
            self.A.cogram() + self.A.project(self.B), 2 * self.D.mm(self.B.T).T, self.D.cogram()
        )


def _times(B: Tensor, scale: float) -> Tensor:
    return B if scale == 1.0 else B * scale


def lower(make: Callable[..., StructuredMatrix]) -> Callable[..., StructuredMatrix]:
    """The transposed structure."""
    return partial(Transposed.eye, of=make)


def upper_dense_first(k: int) -> Callable[..., StructuredMatrix]:
    """[[A, B], [0, diag]] with a k x k dense A."""
    return partial(Upper.eye, k=k)


def upper_dense_last(k: int) -> Callable[..., StructuredMatrix]:
    """[[diag, B], [0, A]] with a k x k dense A."""
    return partial(Upper.eye, k=-k, first=Diagonal.eye, second=Dense.eye)


def hierarchical(k1: int, k2: int) -> Callable[..., StructuredMatrix]:
    """[[A, B1, B2], [0, diag, 0], [0, D, E]] with dense A, k1 x k1, and E, k2 x k2.

    A small n fills A first, then E, then the middle.
    """
    return partial(Upper.eye, k=k1, second=lower(upper_dense_last(k2)))
