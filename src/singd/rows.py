"""Rows: the matrix A [m, d] that a layer hands to the statistics, often without forming it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from singd import kernels
from singd.precision import wide_dtype


class Rows(ABC):
    """A matrix A [m, d] that answers questions about A^T A.

    A structure asks for as little as it needs: a diagonal one for `squares`, a dense one for
    `gram`, and only a structure that has no better idea for `matrix`.

    Attributes:
        count: The number of rows m.
        width: The number of columns d.
    """

    count: int
    width: int

    @abstractmethod
    def matrix(self) -> Tensor:
        """A itself, [m, d], in any memory layout."""

    def gram(self) -> Tensor:
        """A^T A, [d, d]."""
        A = self.matrix()
        return kernels.matmul_symmetric(A.T, A)

    def squares(self) -> Tensor:
        """The diagonal of A^T A, [d]: the sums of squares of the columns."""
        return self.matrix().square().sum(0)

    def sums(self) -> Tensor:
        """The column sums of A, [d]: what a column of ones beside A needs."""
        return self.matrix().sum(0)

    def tmm(self, Y: Tensor) -> Tensor:
        """A^T Y, [d, n], for a dense Y [m, n]."""
        return kernels.matmul(self.matrix().T, Y)

    def mm(self, Y: Tensor) -> Tensor:
        """A Y, [m, n], for a dense Y [d, n]."""
        return kernels.matmul(self.matrix(), Y)

    def columns(self, start: int, stop: int) -> Tensor:
        """The columns A[:, start:stop], [m, stop - start]."""
        return self.matrix()[:, start:stop]

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
        parts = [kernels.block_gram(part.matrix(), k) for part in self.split()]
        if len(parts) == 1:
            return parts[0]
        blocks, last = (torch.stack(same) for same in zip(*parts, strict=True))
        return blocks.sum(0), last.sum(0)


class DenseRows(Rows):
    """Rows that exist as a tensor.

    Args:
        rows: [..., d]; all leading dimensions together count the rows.
    """

    def __init__(self, rows: Tensor) -> None:
        self._rows, self.count, self.width = rows, rows.shape[:-1].numel(), rows.shape[-1]

    def matrix(self) -> Tensor:
        rows = self._rows
        if rows.ndim > 2:
            # Gradients of convolutions come as [B, d, positions], seen as [B, positions, d]: a copy
            # to a transposed [d, m] moves strips of positions, one to [m, d] single numbers.
            across = rows.stride(-1) != 1
            rows = rows.movedim(-1, 0).flatten(1).T if across else rows.flatten(0, -2)
            self._rows = rows  # never copied twice
        return rows

    def squares(self) -> Tensor:
        rows = self._rows
        if rows.ndim == 3 and rows.stride(-2) == 1:  # [B, positions, d] of a convolution
            # one pass along contiguous positions, where square and sum would make a tensor between them
            norms = torch.linalg.vector_norm(rows, dim=1, dtype=wide_dtype(rows.dtype))
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
        self._rows, self.count, self.width = rows, rows.count, rows.width + 1

    def matrix(self) -> Tensor:
        # Written part by part, so that A is not held beside [A | 1]; in the layout of A, so that a transposed one
        # stays cheap to turn.
        out, done = torch.empty(0), 0
        for part in (some.matrix() for some in self._rows.split()):
            across, shape = part.stride(-1) != 1, (self.count, self.width)
            if len(part) == self.count:
                return (
                    pad(part.T, (0, 0, 0, 1), value=1).T if across else pad(part, (0, 1), value=1)
                )
            if not done:
                out = part.new_ones(shape[::-1]).T if across else part.new_ones(shape)
            out[done : done + len(part), :-1] = part
            done += len(part)
        return out

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
        return columns if stop <= last or start > last else pad(columns, (0, 1), value=1)

    def split(self) -> Iterator[Rows]:
        return (WithOnes(part) for part in self._rows.split())

    def block_gram(self, k: int) -> tuple[Tensor, Tensor]:
        blocks, last = self._rows.block_gram(k)
        last = _border(last, self._rows.sums()[self.width - 1 - len(last) :], self.count)
        if len(last) < k:
            return blocks, last
        return torch.cat([blocks, last[None]]), last.new_zeros(0, 0)


def _total(rows: Tensor) -> Tensor:
    """The sum over all dimensions but the last, [d]."""
    if rows.is_contiguous():  # torch sums one dimension faster than several
        rows = rows.flatten(0, -2)
    return rows.sum(tuple(range(rows.ndim - 1)))


def _append(v: Tensor, count: int) -> Tensor:
    """[v, count]."""
    return pad(v, (0, 1), value=_fitting(count, v))


def _fitting(count: int, like: Tensor) -> float:
    """A count as a number of this dtype: beyond float16's range inf, not an exception."""
    return count if count <= torch.finfo(like.dtype).max else math.inf


def _border(G: Tensor, sums: Tensor, count: int) -> Tensor:
    """[[G, sums], [sums^T, count]], the Gram matrix of rows with ones appended."""
    out = pad(G, (0, 1, 0, 1), value=_fitting(count, G))
    out[:-1, -1] = out[-1, :-1] = sums
    return out
