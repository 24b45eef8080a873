"""A structured matrix: seven primitives, and all that follows from them.

A subclass defines ``eye``, ``n``, ``mm``, ``tmm``, ``compose``, ``project`` and ``trace``. What it may override
for speed, and what that is worth, is listed under "What to override" in ``docs/structures.md``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from singd.precision import wide_dtype
from singd.rows import Rows
from singd.structures import picture

Self = TypeVar("Self", bound="StructuredMatrix")


def static(**kw: Any) -> Any:
    """A dataclass field of a structure that is no tensor: a size, say, which every operation keeps as it is.

    Args:
        kw: What `dataclasses.field` takes, for example a ``default``.

    Example:
        >>> from dataclasses import dataclass
        >>> from torch import Tensor
        >>> from singd.structures import StructuredMatrix, static
        >>> @dataclass(eq=False, repr=False)
        ... class ScaledIdentity(StructuredMatrix):
        ...     s: Tensor  # [1]
        ...     size: int = static()
    """
    return field(metadata={"static": True}, **kw)


@dataclass(eq=False)
class Preconditioner:
    """A A^T, formed once for many products: half their cost, for about as many numbers again as A has."""

    multiply: Callable[[Tensor], Tensor]
    dtype: torch.dtype

    def mm_AAt(self, X: Tensor) -> Tensor:
        """A A^T X for a dense X, [n, m]."""
        return self.multiply(X)

    mm_AAt_ = mm_AAt


@dataclass(eq=False, repr=False)
class StructuredMatrix(ABC):
    r"""A square matrix of a set that is closed under addition, scaling and multiplication and contains I.

    A subclass is a dataclass whose fields are tensors, other structured matrices, or `static`. It defines
    ``eye``, ``n``, ``mm``, ``tmm``, ``compose``, ``project`` and ``trace``; everything else is derived here, and
    overridden only for speed. The law of every projection, for symmetric :math:`N`:

    .. math:: \tfrac12 P(N) = \operatorname{arg\,min}_{M} \lVert (M + M^\top) - N \rVert_F
        \quad\text{over members } M .
    """

    batched = False
    """Whether ``torch.func.vmap`` maps the products, so that those of small layers that are alike share calls."""

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

    def dense(self) -> Tensor:
        """The matrix itself, [n, n]."""
        return self.mm(self._identity())

    def _identity(self) -> Tensor:
        return torch.eye(self.n, dtype=self.dtype, device=self.device)

    def __matmul__(self, other: Any) -> Any:
        if isinstance(other, Tensor):
            return self.mm(other[:, None])[:, 0] if other.ndim == 1 else self.mm(other)
        return self.compose(self._alike(other))

    def mm_AAt(self, X: Tensor) -> Tensor:
        """A A^T X for a dense X, [n, m]."""
        return self.mm(self.tmm(X))

    def mm_AAt_(self, X: Tensor) -> Tensor:
        """A A^T X, where X may be overwritten: with the result, or with anything else."""
        return self.mm_AAt(X)

    def mm_AtA(self, X: Tensor) -> Tensor:
        """A^T A X for a dense X, [n, m]."""
        return self.tmm(self.mm(X))

    def preconditioner(self) -> Preconditioner | None:
        """A A^T to keep for many products, or None where that gains nothing."""
        return None

    # -- projections -------------------------------------------------------------------------------------

    def gram(self: Self) -> Self:
        """P(A^T A)."""
        return self.project(self.tmm(self._identity()))

    def cogram(self: Self) -> Self:
        """P(A A^T)."""
        return self.project(self.dense())

    def project_congruence(self: Self, rows: Rows) -> Self:
        """P(A^T R^T R A) for rows R, [m, n]."""
        return self._projected(self.tmm, rows)

    def project_cocongruence(self: Self, rows: Rows) -> Self:
        """P(A R^T R A^T) for rows R, [m, n]."""
        return self._projected(self.mm, rows)

    def _projected(self: Self, apply: Callable[[Tensor], Tensor], rows: Rows) -> Self:
        """P(Y Y^T) for what some product makes of R^T, a few rows at a time where all take much memory."""
        if rows.count == 0:  # an empty batch, which some libraries refuse to transform
            return self.map(torch.zeros_like)
        parts = (self.project(apply(part.matrix().T)) for part in rows.split())
        total = next(parts)
        for P in parts:
            total = total.to(dtype=wide_dtype(P._first().dtype)).add_(P)
        return total.to(dtype=self.dtype)

    # -- a vector space, number by number ----------------------------------------------------------------

    def map(self: Self, function: Callable[..., Tensor], *others: Self) -> Self:
        """Apply a function to each tensor, together with those of other matrices of the same structure."""
        values = []
        for name, is_static in _field_names(type(self)):
            mine = getattr(self, name)
            if not is_static:
                theirs = [getattr(A, name) for A in others]
                # (whether it is a structured matrix takes longer to ask)
                tensor = isinstance(mine, Tensor)
                mine = function(mine, *theirs) if tensor else mine.map(function, *theirs)
            values.append(mine)
        return type(self)(*values)

    def __add__(self: Self, other: Self) -> Self:
        return self.map(torch.add, self._alike(other))

    def __sub__(self: Self, other: Self) -> Self:
        return self.map(torch.sub, self._alike(other))

    def __neg__(self: Self) -> Self:
        return self.map(torch.neg)

    def __mul__(self: Self, scalar: float | Tensor) -> Self:
        return self.map(lambda t: t * scalar)

    __rmul__ = __mul__

    def __truediv__(self: Self, scalar: float | Tensor) -> Self:
        return self.map(lambda t: t / scalar)

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

    def _alike(self: Self, other: Any) -> Self:
        """The other matrix, if both are of one structure and size.

        Raises:
            TypeError: If it is none, or of another structure or size.
        """
        if not isinstance(other, StructuredMatrix):
            raise TypeError(f"{self!r} cannot be combined with {type(other).__name__}.")
        if self._layout() != other._layout():
            raise TypeError(
                f"{self!r} and {other!r} are not of one structure and size; combine their dense() instead."
            )
        return other  # type: ignore[return-value]

    def _layout(self) -> tuple[Any, ...]:
        """The structure with all its sizes, to compare."""
        values = [getattr(self, name) for name, _ in _field_names(type(self))]
        parts = [v._layout() if isinstance(v, StructuredMatrix) else v for v in values]
        return type(self), *(p.shape if isinstance(p, Tensor) else p for p in parts)

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

    def spectral_norm(self, products: int = 8) -> Tensor:
        """The spectral norm, estimated from below by power iteration, 0-d, in float32 at least.

        Four fixed start vectors are multiplied by A and A^T in turn; the largest growth of the last product
        counts. It never exceeds the norm but for rounding; of random members, 8 products find at least 0.85 of
        it and 16 at least 0.95. Nothing waits for the device.

        Args:
            products: How many products to take, at least 1.
        """
        A = self.to(dtype=wide_dtype(self._first().dtype))
        # cosines of angles that grow quadratically: no two entries and no two vectors are alike
        step = torch.arange(1, self.n + 1, dtype=A.dtype, device=self.device)[:, None]
        X = (step * step * (0.618 * torch.arange(1, 5, dtype=A.dtype, device=self.device))).cos()
        for i in range(max(1, products)):
            size = torch.linalg.vector_norm(X, dim=0)
            X = (A.tmm if i % 2 else A.mm)(X / size.clamp(min=torch.finfo(A.dtype).tiny))
        return torch.linalg.vector_norm(X, dim=0).amax()

    # -- storage -----------------------------------------------------------------------------------------

    def tensors(self) -> list[Tensor]:
        """The stored tensors, in a fixed order."""
        found: list[Tensor] = []
        for name, is_static in _field_names(type(self)):
            if not is_static:
                value = getattr(self, name)
                found += [value] if isinstance(value, Tensor) else value.tensors()
        return found

    def _first(self) -> Tensor:
        """The first of the stored tensors."""
        return self.tensors()[0]

    def flat(self) -> Tensor:
        """All stored numbers as one vector, [numel]; a view where there is one tensor only."""
        tensors = [t.reshape(-1) for t in self.tensors()]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def from_flat(self: Self, flat: Tensor) -> Self:
        """The matrix of this structure whose tensors are views of one vector, [numel].

        Raises:
            ValueError: If the vector is of another length.
        """
        if flat.shape != (self.numel,):
            raise ValueError(
                f"{self!r} stores {self.numel} numbers, got a tensor of {tuple(flat.shape)}."
            )
        parts = iter(flat.split_with_sizes([t.numel() for t in self.tensors()]))
        return self.map(lambda t: next(parts).view(t.shape))

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
        index, columns = picture.sampled(self.n)
        entries = self.mm(columns.to(dtype=self.dtype, device=self.device))[index.to(self.device)]
        dtype = str(self.dtype).removeprefix("torch.")
        words = f"{type(self).__name__}, {self.n} x {self.n}, {dtype}"
        numbers = f"{self.numel:,} numbers, {self.numel / max(1, self.n) ** 2:.1%} of dense"
        return picture.html_picture(entries, words, numbers)


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
    def batched(self) -> bool:  # type: ignore[override]
        return self.of.batched

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

    def add_identity_(self, alpha: float | Tensor) -> Transposed:
        self.of.add_identity_(alpha)
        return self

    def mm_AAt(self, X: Tensor) -> Tensor:
        return self.of.mm_AtA(X)

    def mm_AtA(self, X: Tensor) -> Tensor:
        return self.of.mm_AAt(X)

    def project_congruence(self, rows: Rows) -> Transposed:
        return Transposed(self.of.project_cocongruence(rows))

    def project_cocongruence(self, rows: Rows) -> Transposed:
        return Transposed(self.of.project_congruence(rows))

    def gram(self) -> Transposed:
        return Transposed(self.of.cogram())

    def cogram(self) -> Transposed:
        return Transposed(self.of.gram())

    def trace(self) -> Tensor:
        return self.of.trace()


def transposed(make: Callable[..., StructuredMatrix]) -> Callable[..., StructuredMatrix]:
    """The structure of the transposes."""
    return partial(Transposed.eye, of=make)


@cache
def _field_names(structure: type) -> tuple[tuple[str, bool], ...]:
    """The fields of a structure, each with whether it is static."""
    return tuple((f.name, "static" in f.metadata) for f in fields(structure))
