"""The names of structures: ready ones, families with a size in their name, and users' own."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from singd.structures.base import StructuredMatrix
from singd.structures.block_diagonal import BlockDiagonal
from singd.structures.dense import Dense
from singd.structures.diagonal import Diagonal
from singd.structures.toeplitz import UpperToeplitz
from singd.structures.triangular import hierarchical, lower, upper_dense_first, upper_dense_last

Make = Callable[..., StructuredMatrix]


@dataclass(frozen=True)
class Structure:
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

    pattern: str  # "block{}diagonal"
    make: Callable[..., Make]
    shown: tuple[tuple[int, ...], ...]  # the sizes of the members that are listed
    members: str
    projection: str
    numbers: str
    cost: str

    def of(self, *sizes: int) -> Structure:
        if any(k < 1 for k in sizes):
            raise ValueError(f"The sizes in {self.pattern.format(*sizes)!r} must be at least 1.")
        name = self.pattern.format(*sizes)
        words = self.members.format(*sizes)
        return Structure(name, self.make(*sizes), words, self.projection, self.numbers, self.cost)

    def parse(self, name: str) -> Structure | None:
        match = re.fullmatch(self.pattern.replace("{}", r"(\d+)"), name)
        return self.of(*map(int, match.groups())) if match else None


_TOEPLITZ = (
    r"P(N)_0 = \operatorname{mean}_i N_{ii},\; P(N)_j = 2\operatorname{mean}_i N_{i,i+j}",
    "d",
    r"d \log d",
)
_RANK_K = ("(k+1) d", "k d")

FAMILIES = (
    Family(
        "block{}diagonal",
        lambda k: partial(BlockDiagonal.eye, k=k),
        ((30,), (3,)),
        "dense {0} x {0} blocks on the diagonal",
        r"\text{the diagonal blocks of } N",
        "k d",
        "k d",
    ),
    Family(
        "hierarchical{}_{}",
        hierarchical,
        ((15, 15), (3, 2)),
        "dense corners of {} and {}, joined by borders and a diagonal",
        r"N_{11},\; N_{33},\; 2 N_{12},\; 2 N_{13},\; 2 N_{32},\; \operatorname{diag} N_{22}",
        "(k_1 + k_2 + 1) d",
        "(k_1 + k_2) d",
    ),
    Family(
        "trilrank{}first",
        lambda k: lower(upper_dense_first(k)),
        ((4,),),
        "lower triangular: dense block of {} first, its border, a diagonal",
        r"N_{11},\; 2 N_{21},\; \operatorname{diag} N_{22}",
        *_RANK_K,
    ),
    Family(
        "triurank{}first",
        upper_dense_first,
        ((4,),),
        "upper triangular: dense block of {} first, its border, a diagonal",
        r"N_{11},\; 2 N_{12},\; \operatorname{diag} N_{22}",
        *_RANK_K,
    ),
    Family(
        "trilrank{}last",
        lambda k: lower(upper_dense_last(k)),
        ((4,),),
        "lower triangular: a diagonal, then a border and a dense block of {}",
        r"\operatorname{diag} N_{11},\; 2 N_{21},\; N_{22}",
        *_RANK_K,
    ),
    Family(
        "triurank{}last",
        upper_dense_last,
        ((4,),),
        "upper triangular: a diagonal, then a border and a dense block of {}",
        r"\operatorname{diag} N_{11},\; 2 N_{12},\; N_{22}",
        *_RANK_K,
    ),
)

_FIXED = (
    Structure("dense", Dense.eye, "all matrices", "N", "d^2", "d^2"),
    Structure("diagonal", Diagonal.eye, "diagonal matrices", r"\operatorname{diag}(N)", "d", "d"),
    *(family.of(*sizes) for family in FAMILIES for sizes in family.shown),
    Structure(
        "triltoeplitz",
        lower(UpperToeplitz.eye),
        "lower triangular, constant along diagonals",
        *_TOEPLITZ,
    ),
    Structure(
        "triutoeplitz", UpperToeplitz.eye, "upper triangular, constant along diagonals", *_TOEPLITZ
    ),
)
_REGISTRY: dict[str, Structure] = {s.name: s for s in _FIXED}


def structure(spec: Any) -> Structure:
    """The structure that is meant by a name, a class or a function.

    Args:
        spec: A name (``"dense"``, ``"block64diagonal"``, ``"hierarchical4_8"``), a
            :class:`~singd.structures.registry.Structure`, a subclass of
            :class:`~singd.structures.base.StructuredMatrix`, or a function ``(n, *, dtype, device) -> identity``.

    Raises:
        TypeError: If it is none of these.
        ValueError: If the name is unknown; the sentence lists the choices.
    """
    if isinstance(spec, Structure):
        return spec
    if isinstance(spec, type) and issubclass(spec, StructuredMatrix):
        return _named(spec.__name__, spec.eye)
    if callable(spec):
        return _named(getattr(spec, "__name__", repr(spec)), spec)
    if not isinstance(spec, str):
        raise TypeError(f"A structure must be a name, a class or a function of n, got {spec!r}.")
    known = _REGISTRY.get(spec) or _sized(spec)
    if known is None:
        patterns = [family.pattern.format("K", "K") for family in FAMILIES]
        choices = ", ".join([name for name in _REGISTRY if not re.search(r"\d", name)] + patterns)
        raise ValueError(
            f"Unknown structure {spec!r}; choose from {choices} (K is a size of your choice)."
        )
    return known


@cache
def _sized(name: str) -> Structure | None:
    """The member of a family, always the same object for the same name."""
    return next((s for s in (family.parse(name) for family in FAMILIES) if s is not None), None)


def _named(name: str, make: Make) -> Structure:
    """A user's structure: the registered one if it is, so that it goes by one name only."""
    for known in _REGISTRY.values():
        if known.make == make:
            return known
    return Structure(name, make)


def register_structure(
    name: str, make: Make | type[StructuredMatrix], members: str = ""
) -> Structure:
    """Give a structure a name, usable wherever one is.

    Args:
        name: A new name.
        make: A subclass of :class:`~singd.structures.base.StructuredMatrix`, or a function
            ``(n, *, dtype, device) -> identity``.
        members: What the matrices look like, in a few words.

    Raises:
        ValueError: If the name is taken by another structure.
    """
    is_class = isinstance(make, type) and issubclass(make, StructuredMatrix)
    maker: Make = make.eye if is_class else make  # type: ignore[union-attr]
    try:
        known = structure(name)
    except ValueError:
        known = None
    if known is not None and known.make != maker:
        raise ValueError(f"The structure name {name!r} is taken; choose another one.")
    _REGISTRY[name] = Structure(name, maker, members)
    return _REGISTRY[name]


def registered_structures() -> dict[str, Structure]:
    """All names with a structure, families by a few members: what tests, tables and pictures go over."""
    return dict(_REGISTRY)
