r"""Matrices that are diagonal but for some dense rows: the border.

    K = diag(d) + E R

with R, ``[r, n]``, the border rows, E their places (columns of I), and d zero there. Every rank-k triangular and
hierarchical matrix is of this form, or its transpose is. Two products with r rows then do what the recursion
over blocks does with twice as many. From :math:`d E = 0` follows, with :math:`R_E = R E`,

.. math::
    K K^\top = d^2 + d R^\top E^\top + E R d + E R R^\top E^\top, \qquad K^\top K = d^2 + R^\top R .
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from singd.structures.base import RowsLike


@dataclass(eq=False)
class Border:
    """diag(d) + E R. Symmetric matrices are given by it too: by their diagonal, and by the rows of the border.

    Attributes:
        d: The diagonal, [n]; what it holds at the border's places has no meaning, except zeros in a factor.
        R: The rows of the border, [r, n].
        places: The border's places, in order, as ranges (start, stop) of together r numbers.
    """

    d: Tensor
    R: Tensor
    places: Sequence[tuple[int, int]]

    def take(self, X: Tensor) -> Tensor:
        """E^T X: the rows of X, [n, m], at the border's places, [r, m]."""
        parts = [X[start:stop] for start, stop in self.places]
        return torch.cat(parts) if parts else X[:0]

    def _put(self, X: Tensor, rows: Tensor) -> Tensor:
        """Replace the border's rows of X, in place."""
        done = 0
        for start, stop in self.places:
            X[start:stop] = rows[done : done + stop - start]
            done += stop - start
        return X

    @property
    def _corner(self) -> Tensor:
        """R E, [r, r]."""
        return self.take(self.R.T).T

    def compose(self, other: Border) -> Border:
        """The product with another matrix with the same places."""
        R = torch.addmm(self.R * other.d, self._corner, other.R)
        return Border(self.d * other.d, R, self.places)

    def symmetric_mm(self, X: Tensor) -> Tensor:
        """N X, where this is the diagonal and the border's rows of a symmetric N, zero elsewhere; X is [n, m]."""
        out = (self.d[:, None] * X).addmm_(self.R.T, self.take(X))
        return self._put(out, self.R @ X)

    def symmetric_mm_(self, X: Tensor) -> Tensor:
        """The same in place of X."""
        taken, rows = self.take(X), self.R @ X
        return self._put(X.mul_(self.d[:, None]).addmm_(self.R.T, taken), rows)

    def outer(self, X: Tensor) -> Tensor:
        """K K^T X for a dense X, [n, m]."""
        return self.cogram().symmetric_mm(X)

    def co_outer(self, X: Tensor) -> Tensor:
        """K^T K X for a dense X, [n, m]."""
        return (self.d.square()[:, None] * X).addmm_(self.R.T, self.R @ X)

    def gram(self) -> Border:
        """K^T K, symmetric."""
        return Border(
            self.d.square() + self.R.square().sum(0), self._corner.T @ self.R, self.places
        )

    def cogram(self) -> Border:
        """K K^T, symmetric."""
        Rd = self.R * self.d
        rows = self._put(Rd.T.contiguous(), self.R @ self.R.T).T
        return Border(self.d.square(), rows, self.places)

    def sandwich(self, rows: RowsLike) -> Border:
        """K^T S K with S = A^T A of rows A, [m, n]: from the diagonal of S and its columns at the places."""
        if self._wide:
            whole = rows.gram()
            S, squares = self.take(whole), whole.diagonal()
        else:
            S, squares = rows.tmm(self._columns(rows)).T, rows.squares()
        Sd = S * self.d  # S is [r, n], symmetric at the places
        SK = torch.addmm(Sd, self.take(S.T).T, self.R)  # E^T S K
        diagonal = self.d.square() * squares + (self.R * (SK + Sd)).sum(0)
        return Border(diagonal, self._corner.T @ SK, self.places)

    def co_sandwich(self, rows: RowsLike) -> Border:
        """K S K^T with S = A^T A of rows A, [m, n]: from the diagonal of S and S R^T."""
        if self._wide:
            whole = rows.gram()
            S, squares = self.R @ whole, whole.diagonal()
        else:
            S, squares = rows.tmm(rows.mm(self.R.T)).T, rows.squares()
        border = self._put((S * self.d).T.contiguous(), self.R @ S.T).T  # S is [r, n]
        return Border(self.d.square() * squares, border, self.places)

    @property
    def _wide(self) -> bool:
        """Whether so many rows are dense that all of A^T A takes less time than their part (measured)."""
        return 2 * len(self.R) >= self.R.shape[1]

    def _columns(self, rows: RowsLike) -> Tensor:
        """A E, [m, r]."""
        parts = [rows.columns(start, stop) for start, stop in self.places]
        return torch.cat(parts, dim=1) if parts else rows.columns(0, 0)
