"""The interface of a structured matrix, and all that follows from its few primitives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from singd.structures.border import Border
from singd.structures.congruence import Congruence

Self = TypeVar("Self", bound="StructuredMatrix")


class RowsLike(Protocol):
    """A matrix [m, n] that answers questions about its Gram matrix (see ``singd.layers.Rows``)."""

    @property
    def count(self) -> int: ...
    def matrix(self) -> Tensor: ...
    def gram(self) -> Tensor: ...
    def squares(self) -> Tensor: ...
    def block_gram(self, k: int) -> tuple[Tensor, Tensor]: ...
    def columns(self, start: int, stop: int) -> Tensor: ...
    def mm(self, Y: Tensor) -> Tensor: ...
    def tmm(self, Y: Tensor) -> Tensor: ...
    def narrow(self, start: int, stop: int) -> RowsLike: ...
    def split(self) -> Iterator[RowsLike]: ...


@dataclass(eq=False)
class OuterProduct:
    """A A^T, formed once for many products: half their cost, for about as many numbers again as A has."""

    multiply: Callable[[Tensor], Tensor]
    dtype: torch.dtype
    multiply_: Callable[[Tensor], Tensor] | None = None  # the same, where X may be overwritten

    def outer(self, X: Tensor) -> Tensor:
        """A A^T X for a dense X, [n, m]."""
        return self.multiply(X)

    def outer_(self, X: Tensor) -> Tensor:
        """The same, where X may be overwritten."""
        return (self.multiply_ or self.multiply)(X)
    mm_AAt, mm_AAt_ = outer, outer_


@dataclass(eq=False, repr=False)
class StructuredMatrix(ABC):
    r"""A square matrix of a set that is closed under addition, scaling and multiplication and contains I.

    A subclass is a dataclass whose fields are tensors or other structured matrices. It defines ``eye``,
    ``n``, ``mm``, ``tmm``, ``compose``, ``project`` and ``trace``; everything else is derived here, and
    overridden only for speed. The law of every projection, for symmetric :math:`N`:

    .. math:: \tfrac12 P(N) = \operatorname{arg\,min}_{M} \lVert (M + M^\top) - N \rVert_F
        \quad\text{over members } M .
    """

    # -- the primitives ------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def eye(cls: type[Self], n: int, **kw: Any) -> Self:
        """The identity of size n; ``kw`` are torch's ``dtype`` and ``device``."""

    @property
    @abstractmethod
    def n(self) -> int:
        """The number of rows, and of columns."""

    @abstractmethod
    def mm(self, X: Tensor) -> Tensor:
        """A X for a dense X, [n, m]."""

    @abstractmethod
    def tmm(self, X: Tensor) -> Tensor:
        """A^T X for a dense X, [n, m]."""

    @abstractmethod
    def compose(self: Self, other: Self) -> Self:
        """A B for a B of the same structure."""

    @abstractmethod
    def project(self: Self, Y: Tensor) -> Self:
        """P(Y Y^T) for a dense Y, [n, m], onto this structure."""

    @abstractmethod
    def trace(self) -> Tensor:
        """The sum of the diagonal, 0-d, in float32 at least."""

    # -- products --------------------------------------------------------------------------------------

    @property
    def T(self) -> StructuredMatrix:
        """The transpose."""
        return Transposed(self)

    def outer(self, X: Tensor) -> Tensor:
        """A A^T X for a dense X, [n, m]."""
        return self.mm(self.tmm(X))

    def outer_(self, X: Tensor) -> Tensor:
        """A A^T X, where X may be overwritten: with the result, or with anything else."""
        return self.outer(X)

    def co_outer(self, X: Tensor) -> Tensor:
        """A^T A X for a dense X, [n, m]."""
        return self.tmm(self.mm(X))

    def outer_product(self) -> OuterProduct | None:
        """A A^T to keep for many products, or None where that gains nothing."""
        return None

    def gram(self: Self) -> Self:
        """P(A^T A)."""
        return self.project(self.tmm(self._identity()))

    def cogram(self: Self) -> Self:
        """P(A A^T)."""
        return self.project(self.dense())

    def project_pair(self: Self, V: Tensor, W: Tensor) -> Self:
        """P(V W^T + W V^T) for dense V and W, [n, m]."""
        # By polarisation, as P is linear. Without equal norms the larger of the two squares would
        # drown the product: V is often a factor and W a statistic that is smaller by many orders.
        v, w = (torch.linalg.vector_norm(t, dim=0, dtype=wide(t)) for t in (V, W))
        tiny = torch.finfo(v.dtype).tiny
        balance = (w.clamp(min=tiny) / v.clamp(min=tiny)).sqrt()
        V, W, dtype = V * balance, W / balance, V.dtype
        P = self.project(V + W).mul_(0.5).add_(self.project(V - W), -0.5)
        return P.to(dtype=dtype)

    def sandwich(self: Self, rows: RowsLike) -> Self:
        """P(A^T R^T R A) for rows R, [m, n]."""
        return self._projected(self.tmm, rows)

    def curvature(self: Self, rows: RowsLike) -> Self | Congruence:
        """The same, perhaps with a product still to be formed, for a sum with ``gram_beside`` it."""
        return self.sandwich(rows)

    def gram_beside(self: Self, H: Self | Congruence) -> Self | Congruence:
        """P(A^T A) in the form of a curvature of A."""
        return self.gram()

    def formed(self: Self) -> Self:
        """The matrix itself, as a curvature."""
        return self

    def add_to(self: Self, m: Self, a: float | Tensor, gram: Any, b: float | Tensor) -> Self:
        """Add a H + b P(A^T A) to m in place, with this curvature H of A and the ``gram_beside`` it."""
        return m.add_(self, a).add_(gram, b)

    def co_sandwich(self: Self, rows: RowsLike) -> Self:
        """P(A R^T R A^T) for rows R, [m, n]."""
        return self._projected(self.mm, rows)

    def _projected(self: Self, apply: Callable[[Tensor], Tensor], rows: RowsLike) -> Self:
        """P(Y Y^T) for what some product makes of R^T, a few rows at a time where all take much memory."""
        if rows.count == 0:  # an empty batch, which some libraries refuse to transform
            return self.map(torch.zeros_like)
        parts = (self.project(apply(part.matrix().T)) for part in rows.split())
        total = next(parts)
        for P in parts:
            total = total.to(dtype=torch.promote_types(P.dtype, torch.float32)).add_(P)
        return total.to(dtype=self.dtype)

    def dense(self) -> Tensor:
        """The matrix itself, [n, n]."""
        return self.mm(self._identity())

    def _identity(self) -> Tensor:
        return torch.eye(self.n, dtype=self.dtype, device=self.device)

    def __matmul__(self, other: Any) -> Any:
        return self.mm(other) if isinstance(other, Tensor) else self.compose(other)

    # -- a border of dense rows around a diagonal --------------------------------------------------------

    def border(self, transposed: bool = False) -> Border | None:
        """The matrix (or its transpose) as a diagonal with dense rows, or None if it is of another form."""
        return None

    def _border_product(self) -> OuterProduct | None:
        """A A^T from the border, to keep."""
        form = self.border()
        if form is None:
            return None
        product = form.cogram()
        return OuterProduct(product.symmetric_mm, self.dtype, product.symmetric_mm_)

    def with_border(self: Self, border: Border, transposed: bool, off: float = 1.0) -> Self:
        """The member of this structure with these rows; the inverse of ``border``.

        Args:
            border: A diagonal and rows at the places of this matrix' own.
            transposed: Whether they are those of the transpose.
            off: A factor for the blocks off the diagonal: 2 makes of N the projection P(N).
        """
        raise NotImplementedError(f"{type(self).__name__} has no border.")

    # interim
    def mm_AAt(self, X): return self.outer(X)
    def mm_AAt_(self, X): return self.outer_(X)
    def project_congruence(self, rows): return self.sandwich(rows)
    def preconditioner(self): return self.outer_product() or self
    def spectral_norm(self, products=6):
        v = torch.randn(self.n, 1, generator=torch.Generator().manual_seed(0)).to(self._first())
        for _ in range(products):
            v = self.tmm(self.mm(v))
            v = v / v.norm().clamp(min=1e-30)
        return 1.1 * self.mm(v).norm()

    # -- a vector space, number by number ----------------------------------------------------------------

    def map(self: Self, function: Callable[..., Tensor], *others: Self) -> Self:
        """Apply a function to each tensor, together with those of other matrices of the same structure."""
        values = []
        for name in _field_names(type(self)):
            mine, theirs = getattr(self, name), [getattr(A, name) for A in others]
            if isinstance(mine, Tensor):
                values.append(function(mine, *theirs))
            else:
                values.append(mine.map(function, *theirs))
        return type(self)(*values)

    def __add__(self: Self, other: Self) -> Self:
        return self.map(torch.add, other)

    def __sub__(self: Self, other: Self) -> Self:
        return self.map(torch.sub, other)

    def __mul__(self: Self, scalar: float | Tensor) -> Self:
        return self.map(lambda t: t * scalar)

    __rmul__ = __mul__

    def add_(self: Self, other: Self, alpha: float | Tensor = 1.0) -> Self:
        """Add ``alpha`` times another matrix in place."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            if isinstance(alpha, Tensor):  # torch's own alpha would wait for the device
                mine.addcmul_(theirs, alpha)
            else:
                mine.add_(theirs, alpha=alpha)
        return self

    def mul_(self: Self, scalar: float | Tensor) -> Self:
        """Scale in place."""
        for mine in self.tensors():
            mine.mul_(scalar)
        return self

    def add_identity_(self: Self, alpha: float | Tensor) -> Self:
        """Add ``alpha`` times the identity in place."""
        return self.add_(self.project(self._identity()), alpha)  # P(I) = I in every structure

    # -- measures ----------------------------------------------------------------------------------------

    def average_trace(self) -> Tensor:
        """The trace over n, 0-d."""
        return self.trace() / self.n

    def norm(self) -> Tensor:
        """The Frobenius norm, 0-d: a projection keeps the trace, so tr P(A^T A) is its square."""
        return self.gram().trace().sqrt()

    def max_abs(self) -> Tensor:
        """The largest absolute value of an entry, 0-d."""
        return torch.stack([t.abs().amax() for t in self.tensors() if t.numel()]).amax()

    # -- storage -----------------------------------------------------------------------------------------

    def tensors(self) -> list[Tensor]:
        """The stored tensors, in a fixed order."""
        found: list[Tensor] = []
        for name in _field_names(type(self)):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                found.append(value)
            else:
                found += value.tensors()
        return found

    def _first(self) -> Tensor:
        """The first of the stored tensors."""
        first = getattr(self, _field_names(type(self))[0])
        return first if isinstance(first, Tensor) else first._first()

    def with_tensors(self: Self, tensors: Sequence[Tensor]) -> Self:
        """The matrix of this structure that stores other tensors; the inverse of ``tensors``."""
        rest = iter(tensors)
        return self.map(lambda _: next(rest))

    def flat(self) -> Tensor:
        """All stored numbers as one vector, [numel]; a view where there is one tensor only."""
        tensors = [t.reshape(-1) for t in self.tensors()]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def from_flat(self: Self, flat: Tensor) -> Self:
        """The matrix of this structure whose tensors are views of one vector, [numel].

        Raises:
            ValueError: If the vector is of another length.
        """
        old = self.tensors()
        sizes = [t.numel() for t in old]
        if flat.shape != (sum(sizes),):
            raise ValueError(
                f"{self!r} stores {self.numel} numbers, got a tensor of {tuple(flat.shape)}."
            )
        parts = flat.split_with_sizes(sizes)
        return self.with_tensors([p.view(t.shape) for p, t in zip(parts, old, strict=True)])

    @property
    def numel(self) -> int:
        """How many numbers are stored."""
        return sum(t.numel() for t in self.tensors())

    @property
    def dtype(self) -> torch.dtype:
        return self._first().dtype

    @property
    def device(self) -> torch.device:
        return self._first().device

    def to(self: Self, *, dtype: torch.dtype | None = None, device: Any = None) -> Self:
        """The matrix in another dtype or on another device; itself if nothing changes."""
        if dtype in (None, self.dtype) and device is None:
            return self
        return self.map(lambda t: t.to(dtype=dtype, device=device))

    # -- what it shows -----------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return f"{type(self).__name__}(n={self.n}, {self.numel} numbers, {self.dtype})"

    def _repr_html_(self) -> str:
        from singd.report import picture
        return picture.html_picture(self)


@dataclass(eq=False, repr=False)
class Transposed(StructuredMatrix):
    """The transpose of another structured matrix; a structure of its own, since P(N) is then transposed too."""

    of: StructuredMatrix

    @classmethod
    def eye(  # type: ignore[override]
        cls, n: int, *, of: Callable[..., StructuredMatrix], **kw: Any
    ) -> Transposed:
        return cls(of(n, **kw))

    @property
    def n(self) -> int:
        return self.of.n

    @property
    def T(self) -> StructuredMatrix:
        return self.of

    def mm(self, X: Tensor) -> Tensor:
        return self.of.tmm(X)

    def tmm(self, X: Tensor) -> Tensor:
        return self.of.mm(X)

    def compose(self, other: Transposed) -> Transposed:
        return Transposed(other.of.compose(self.of))

    def project(self, Y: Tensor) -> Transposed:
        return Transposed(self.of.project(Y))

    def project_pair(self, V: Tensor, W: Tensor) -> Transposed:
        return Transposed(self.of.project_pair(V, W))

    def add_identity_(self, alpha: float | Tensor) -> Transposed:
        self.of.add_identity_(alpha)
        return self

    def outer(self, X: Tensor) -> Tensor:
        return self.of.co_outer(X)

    def co_outer(self, X: Tensor) -> Tensor:
        return self.of.outer(X)

    def outer_product(self) -> OuterProduct | None:
        return self._border_product()

    def sandwich(self, rows: RowsLike) -> Transposed:
        return Transposed(self.of.co_sandwich(rows))

    def co_sandwich(self, rows: RowsLike) -> Transposed:
        return Transposed(self.of.sandwich(rows))

    def gram(self) -> Transposed:
        return Transposed(self.of.cogram())

    def cogram(self) -> Transposed:
        return Transposed(self.of.gram())

    def trace(self) -> Tensor:
        return self.of.trace()

    def border(self, transposed: bool = False) -> Border | None:
        return self.of.border(not transposed)

    def with_border(self, border: Border, transposed: bool, off: float = 1.0) -> Transposed:
        return Transposed(self.of.with_border(border, not transposed, off))


Curvature: TypeAlias = StructuredMatrix | Congruence
"""P(K^T S K): a matrix of K's structure, or one whose last product waits."""


@cache
def _field_names(structure: type) -> tuple[str, ...]:
    return tuple(f.name for f in fields(structure))


def wide(t: Tensor) -> torch.dtype:
    """The dtype to sum in: float32 at least."""
    return torch.promote_types(t.dtype, torch.float32)
