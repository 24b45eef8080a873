"""The names of structures: ready ones, families with a size in their name, and users' own."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from singd.structures.base import StructuredMatrix, transposed
from singd.structures.block_diagonal import BlockDiagonal
from singd.structures.bordered import Bordered
from singd.structures.dense import Dense
from singd.structures.diagonal import Diagonal
from singd.structures.toeplitz import UpperToeplitz

Make = Callable[..., StructuredMatrix]


@dataclass(frozen=True)
class StructureSpec:
    """A named way to make identities: ``structure("dense")(4, dtype=torch.float64)``.

    Attributes:
        name: The canonical name, which goes into checkpoints.
        make: ``(n, *, dtype, device) -> identity``.
        members: What the matrices look like, in a few words.
        projection: P(N), as LaTeX; of blocks, those that are not zero.
        numbers: How many numbers are stored, about, as LaTeX.
        cost: Multiplications of a product with one vector, about, as LaTeX.
    """

    name: str
    make: Make
    members: str = ""
    projection: str = ""
    numbers: str = ""
    cost: str = ""

    def __call__(self, n: int, **kw: Any) -> StructuredMatrix:
        return self.make(n, **kw)


@dataclass(frozen=True)
class Family:
    """Structures with sizes in their name, such as ``block30diagonal``."""

    shown: tuple[tuple[int, ...], ...]  # the sizes of the members that are listed
    pattern: str  # "block{}diagonal"
    make: Callable[..., Make]  # of the sizes
    words: tuple[str, str, str, str]  # members (with a {} for each size), projection, numbers, cost

    def of(self, *sizes: int) -> StructureSpec:
        name, (members, *formulas) = self.pattern.format(*sizes), self.words
        if min(sizes) < 1:
            raise ValueError(f"The sizes in {name!r} must be at least 1.")
        return StructureSpec(name, self.make(*sizes), members.format(*sizes), *formulas)

    def parse(self, name: str) -> StructureSpec | None:
        match = re.fullmatch(self.pattern.replace("{}", r"(\d+)"), name)
        return self.of(*map(int, match.groups())) if match else None


_RANK_K, _PARTS = ("(k+1) d", "k d"), "dense block of {} first, its border, a diagonal"
_TOEPLITZ = r"P(N)_0 = \operatorname{mean}_i N_{ii},\; P(N)_j = 2\operatorname{mean}_i N_{i,i+j}"
_CORNERS = r"N_{11},\; N_{33},\; 2 N_{12},\; 2 N_{13},\; 2 N_{32},\; \operatorname{diag} N_{22}"

# fmt: off
FAMILIES = (
    Family(((30,), (3,)), "block{}diagonal", lambda k: partial(BlockDiagonal.eye, k=k),
           ("dense {0} x {0} blocks on the diagonal", r"\text{the diagonal blocks of } N", "k d", "k d")),
    Family(((15, 15), (3, 2)), "hierarchical{}_{}", lambda k, l: partial(Bordered.eye, first=k, last=l),
           ("dense corners of {} and {}, joined by borders and a diagonal",
            _CORNERS, "(k_1 + k_2 + 1) d", "(k_1 + k_2) d")),
    Family(((4,),), "trilrank{}first", lambda k: transposed(partial(Bordered.eye, first=k)),
           (f"lower triangular: {_PARTS}", r"N_{11},\; 2 N_{21},\; \operatorname{diag} N_{22}", *_RANK_K)),
    Family(((4,),), "triurank{}first", lambda k: partial(Bordered.eye, first=k),
           (f"upper triangular: {_PARTS}", r"N_{11},\; 2 N_{12},\; \operatorname{diag} N_{22}", *_RANK_K)),
    Family(((4,),), "trilrank{}last", lambda k: partial(Bordered.eye, last=k),
           ("lower triangular: a diagonal, then a border and a dense block of {}",
            r"\operatorname{diag} N_{11},\; 2 N_{21},\; N_{22}", *_RANK_K)),
    Family(((4,),), "triurank{}last", lambda k: transposed(partial(Bordered.eye, last=k)),
           ("upper triangular: a diagonal, then a border and a dense block of {}",
            r"\operatorname{diag} N_{11},\; 2 N_{12},\; N_{22}", *_RANK_K)),
)
_REGISTRY: dict[str, StructureSpec] = {s.name: s for s in (
    StructureSpec("dense", Dense.eye, "all matrices", "N", "d^2", "d^2"),
    StructureSpec("diagonal", Diagonal.eye, "diagonal matrices", r"\operatorname{diag}(N)", "d", "d"),
    *(family.of(*sizes) for family in FAMILIES for sizes in family.shown),
    StructureSpec("triltoeplitz", transposed(UpperToeplitz.eye),
                  "lower triangular, constant along diagonals", _TOEPLITZ, "d", r"d \log d"),
    StructureSpec("triutoeplitz", UpperToeplitz.eye,
                  "upper triangular, constant along diagonals", _TOEPLITZ, "d", r"d \log d"),
)}
# fmt: on


def structure(spec: Any) -> StructureSpec:
    """The structure that is meant by a name, a class or a function.

    Args:
        spec: A name (``"dense"``, ``"block64diagonal"``, ``"hierarchical4_8"``), a
            :class:`~singd.structures.registry.StructureSpec`, a subclass of
            :class:`~singd.structures.base.StructuredMatrix`, or a function ``(n, *, dtype, device) -> identity``
            that was made by ``def``, or by ``functools.partial`` of one with plain values.

    Raises:
        TypeError: If it is none of these.
        ValueError: If the name is unknown; the sentence lists the choices. Or if it is a function without a name
            that would mean the same in another process.
    """
    if isinstance(spec, StructureSpec):
        return spec
    if isinstance(spec, str):
        return _named(spec)
    make = _maker(spec)
    if not callable(make):
        raise TypeError(f"A structure must be a name, a class or a function of n, got {spec!r}.")
    for known in _REGISTRY.values():  # so that it goes by one name only
        if known.make == make:
            return known
    return StructureSpec(_lasting_name(spec), make)


def _maker(spec: Any) -> Any:
    """The function of n that is meant by a structure's class or by itself."""
    is_class = isinstance(spec, type) and issubclass(spec, StructuredMatrix)
    return spec.eye if is_class else spec


@cache
def _sized(name: str) -> StructureSpec | None:
    """The member of a family, always the same object for the same name."""
    return next((s for s in (family.parse(name) for family in FAMILIES) if s is not None), None)


def _named(name: str) -> StructureSpec:
    known = _REGISTRY.get(name) or _sized(name)
    if known is None:
        patterns = [family.pattern.format("K", "K") for family in FAMILIES]
        choices = ", ".join([name for name in _REGISTRY if not re.search(r"\d", name)] + patterns)
        raise ValueError(
            f"Unknown structure {name!r}; choose from {choices} (K is a size of your choice)."
        )
    return known


def _lasting_name(make: Any) -> str:
    """A function's name, which a checkpoint keeps; of a partial one, with the values that it fixes."""
    if isinstance(make, partial):
        fixed = [("", v) for v in make.args]
        fixed += [(f"{name}=", v) for name, v in sorted(make.keywords.items())]
        if all(isinstance(v, int | float | str | None) for _, v in fixed):
            values = ", ".join(f"{name}{v!r}" for name, v in fixed)
            return f"{_lasting_name(make.func)}({values})"
    name = getattr(make, "__name__", "<")
    if name.startswith("<"):
        raise ValueError(
            f"The structure {make!r} has no name that a checkpoint could keep; "
            "make it by def, or give it a name by register_structure."
        )
    return make.__qualname__ if hasattr(make, "__self__") else name


def register_structure(
    name: str, make: Make | type[StructuredMatrix], members: str = ""
) -> StructureSpec:
    """Give a structure a name, usable wherever one is.

    Args:
        name: A new name.
        make: A subclass of :class:`~singd.structures.base.StructuredMatrix`, or a function
            ``(n, *, dtype, device) -> identity``.
        members: What the matrices look like, in a few words.

    Raises:
        ValueError: If the name is taken by another structure.
    """
    maker = _maker(make)
    known = _REGISTRY.get(name) or _sized(name)
    if known is not None and known.make != maker:
        raise ValueError(f"The structure name {name!r} is taken; choose another one.")
    _REGISTRY[name] = StructureSpec(name, maker, members)
    return _REGISTRY[name]


def registered_structures() -> dict[str, StructureSpec]:
    """All names with a structure, families by a few members: what tests, tables and pictures go over."""
    return dict(_REGISTRY)
