"""Rows: the matrix A [m, d] that a layer hands to the statistics, often without forming it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from singd.products import as_rows, multiply, symmetric


class Rows(ABC):
    """A matrix A [m, d] that answers questions about A^T A.

    A structure asks for as little as it needs: a diagonal one for `squares`, a dense one for
    `gram`, and only a structure that has no better idea for `matrix`.
    """

    @property
    @abstractmethod
    def count(self) -> int:
        """The number of rows m."""

    @property
    @abstractmethod
    def width(self) -> int:
        """The number of columns d."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """A itself, [m, d], in any memory layout."""

    def gram(self) -> Tensor:
        """A^T A, [d, d]."""
        A = self.matrix()
        return symmetric(A.T, A)

    def squares(self) -> Tensor:
        """The diagonal of A^T A, [d]: the sums of squares of the columns."""
        return self.matrix().square().sum(0)

    def sums(self) -> Tensor:
        """The column sums of A, [d]: what a column of ones beside A needs."""
        return self.matrix().sum(0)

    def tmm(self, Y: Tensor) -> Tensor:
        """A^T Y, [d, n], for a dense Y [m, n]."""
        return multiply(self.matrix().T, Y)

    def mm(self, Y: Tensor) -> Tensor:
        """A Y, [m, n], for a dense Y [d, n]."""
        return multiply(self.matrix(), Y)

    def columns(self, start: int, stop: int) -> Tensor:
        """The columns A[:, start:stop], [m, stop - start]."""
        return self.matrix()[:, start:stop]

    def narrow(self, start: int, stop: int) -> Rows:
        """The columns A[:, start:stop] as rows that stay lazy."""
        return Narrowed(self, start, stop)

    def split(self) -> Iterator[Rows]:
        """Smaller `Rows` which stacked are this one, for sums over rows whose `matrix` is large."""
        yield self

    def block_gram(self, k: int) -> tuple[Tensor, Tensor]:
        """The diagonal k x k blocks of A^T A.

        Returns:
            The d // k whole blocks [d // k, k, k], and the smaller last one [d % k, d % k].
        """
        if self.width <= k:  # one block, of which all entries count
            gram = self.gram()
            whole = self.width == k
            return (gram[None], gram[:0, :0]) if whole else (gram.new_zeros(0, k, k), gram)
        size = _rounded(k)
        count, inside = self.width // k, max(0, (self.width - size) // k + 1)
        totals: list[Tensor] = []
        for part in self.split():
            X = part.matrix().T  # [d, m]
            pieces = [
                # each block with the first rows of the next one, whose products are not used
                X.unfold(0, size, k).mT if inside else X.new_empty(0, size, X.shape[1]),
                X[inside * k : count * k].unflatten(0, (count - inside, k)),
                X[count * k :],
            ]
            totals = totals or [
                p.new_zeros(*p.shape[:-1], p.shape[-2], dtype=wide(p.dtype)) for p in pieces
            ]
            for total, piece in zip(totals, pieces, strict=True):
                add_product_(total, piece, piece.mT)
        first, others, last = (total.to(X.dtype) for total in totals)
        return torch.cat([first[:, :k, :k], others]), last


def _rounded(k: int) -> int:
    """The next multiple of 16 if it is near: products of 32 rows take less time than of 30 (measured)."""
    rounded = 16 * -(-k // 16)
    return rounded if rounded - k <= k // 8 else k


class Narrowed(Rows):
    """Some neighbouring columns of other rows, [m, stop - start]."""

    def __init__(self, rows: Rows, start: int, stop: int) -> None:
        self._rows, self._start, self._stop = rows, start, stop

    @property
    def count(self) -> int:
        return self._rows.count

    @property
    def width(self) -> int:
        return self._stop - self._start

    def matrix(self) -> Tensor:
        return self._rows.columns(self._start, self._stop)

    def squares(self) -> Tensor:
        return self._rows.squares()[self._start : self._stop]

    def sums(self) -> Tensor:
        return self._rows.sums()[self._start : self._stop]

    def tmm(self, Y: Tensor) -> Tensor:
        return self._rows.tmm(Y)[self._start : self._stop]

    def columns(self, start: int, stop: int) -> Tensor:
        return self._rows.columns(self._start + start, self._start + stop)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Where to sum many terms: float32 for half precision, whose sums would stall, or the dtype."""
    return torch.promote_types(dtype, torch.float32)


def add_product_(total: Tensor, A: Tensor, B: Tensor) -> None:
    """Add A @ B, of matrices or of stacks of them, to a total of the same or a wider dtype."""
    if total.dtype != A.dtype:
        total += A @ B
    elif total.ndim == 2:
        total.addmm_(A, B)
    else:
        total.baddbmm_(A, B)


class DenseRows(Rows):
    """Rows that exist as a tensor.

    Args:
        rows: [..., d]; all leading dimensions together count the rows.
    """

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows

    @property
    def count(self) -> int:
        return self._rows.shape[:-1].numel()

    @property
    def width(self) -> int:
        return self._rows.shape[-1]

    def matrix(self) -> Tensor:
        rows = self._rows
        if rows.ndim > 2:
            # Gradients of convolutions come as [B, d, positions], seen as [B, positions, d]: a copy
            # to a transposed [d, m] moves strips of positions, one to [m, d] single numbers.
            across = rows.stride(-1) != 1
            rows = as_rows(rows.movedim(-1, 0), 1).T if across else rows.flatten(0, -2)
            self._rows = rows  # never copied twice
        return rows

    def narrow(self, start: int, stop: int) -> Rows:
        return DenseRows(self.matrix()[:, start:stop])

    def squares(self) -> Tensor:
        rows = self._rows
        if rows.ndim == 3 and rows.stride(-2) == 1:  # [B, positions, d] of a convolution
            # one pass along contiguous positions, where square and sum would make a tensor between them
            norms = torch.linalg.vector_norm(rows, dim=1, dtype=wide(rows.dtype))
            return norms.square().sum(0).to(rows.dtype)
        return _total(rows.square())

    def sums(self) -> Tensor:
        return _total(self._rows)


class WithOnes(Rows):
    """[A | 1]: rows with a column of ones appended, the input that a bias multiplies.

    Args:
        rows: A, [m, d]; the result is [m, d + 1].
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    @property
    def count(self) -> int:
        return self._rows.count

    @property
    def width(self) -> int:
        return self._rows.width + 1

    def matrix(self) -> Tensor:
        # Part by part, so that A is not held beside [A | 1].
        return _append_ones(self._rows.count, (part.matrix() for part in self._rows.split()))

    def gram(self) -> Tensor:
        return _border(self._rows.gram(), self._rows.sums(), self.count)

    def squares(self) -> Tensor:
        return _append(self._rows.squares(), self.count)

    def sums(self) -> Tensor:
        return _append(self._rows.sums(), self.count)

    def tmm(self, Y: Tensor) -> Tensor:
        return torch.cat([self._rows.tmm(Y).T, Y.sum(0)[:, None]], dim=1).T

    def mm(self, Y: Tensor) -> Tensor:
        return self._rows.mm(Y[:-1]) + Y[-1]

    def columns(self, start: int, stop: int) -> Tensor:
        last = self.width - 1
        columns = self._rows.columns(min(start, last), min(stop, last))
        return columns if stop <= last or start > last else _append_ones(self.count, [columns])

    def split(self) -> Iterator[Rows]:
        return (WithOnes(part) for part in self._rows.split())

    def block_gram(self, k: int) -> tuple[Tensor, Tensor]:
        blocks, last = self._rows.block_gram(k)
        beside = self._rows.narrow(self.width - 1 - len(last), self.width - 1)
        last = _border(last, beside.sums(), self.count)
        if len(last) < k:
            return blocks, last
        return torch.cat([blocks, last[None]]), last.new_zeros(0, 0)


def _total(rows: Tensor) -> Tensor:
    """The sum over all dimensions but the last, [d]."""
    if rows.is_contiguous():  # torch sums one dimension faster than several (measured)
        rows = rows.flatten(0, -2)
    return rows.sum(tuple(range(rows.ndim - 1)))


def _append_ones(count: int, parts: Iterable[Tensor]) -> Tensor:
    """[A | 1] for A [count, d] in parts, in their layout: a transposed A stays cheap to turn."""
    out, done = None, 0
    for part in parts:
        m, d = part.shape
        if out is None:
            across = part.stride(-1) != 1
            out = part.new_empty(d + 1, count).T if across else part.new_empty(count, d + 1)
        out[done : done + m, :d] = part
        done += m
    assert out is not None  # a part may be empty, but there is one
    out[:, -1] = 1
    return out


def _append(v: Tensor, count: int) -> Tensor:
    """[v, count]; as a product, so that a count beyond float16's range is inf, not an exception."""
    return torch.cat([v, v.new_ones(1) * count])


def _border(G: Tensor, sums: Tensor, count: int) -> Tensor:
    """[[G, sums], [sums^T, count]], the Gram matrix of rows with ones appended."""
    d = len(G)
    out = G.new_empty(d + 1, d + 1)
    out[:d, :d] = G
    out[:d, d] = sums
    out[d] = _append(sums, count)
    return out
