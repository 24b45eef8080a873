"""Names, sizes in names, users' structures, and what is said of a wrong one."""

import functools
from dataclasses import dataclass

import pytest
import torch
from circulant import Circulant

from singd import register_structure, registered_structures, structure
from singd.structures import BlockDiagonal, Dense, StructuredMatrix, registry, static


@pytest.mark.parametrize(
    "name",
    [
        "dense", "diagonal", "block30diagonal", "hierarchical15_15", "triltoeplitz", "triutoeplitz",
        "block64diagonal", "hierarchical4_8", "trilrank5first", "triurank5first", "trilrank5last", "triurank5last",
    ],
)  # fmt: skip
def test_names_are_canonical(name):
    assert structure(name).name == name
    assert structure(structure(name)) is structure(name) or structure(structure(name)) == structure(
        name
    )
    assert structure(name)(3, dtype=torch.float64).dtype == torch.float64


def test_sizes_in_names_are_bound():
    assert structure("block64diagonal")(130).blocks.shape == (2, 64, 64)
    assert structure("block64diagonal")(130).last.shape == (2, 2)
    A = structure("hierarchical4_8")(30)
    assert (A.first, A.last) == (4, 8)
    small = structure("hierarchical4_8")(6)
    assert (small.first, small.last) == (
        4,
        2,
    )  # the first rows, then the last ones, then the middle


@pytest.mark.parametrize(
    ("name", "zero"),
    [
        ("trilrank2first", lambda i, j: not (i == j or (j < 2 and (i >= j or i < 2)))),
        ("triurank2first", lambda i, j: not (i == j or (i < 2 and (j >= i or j < 2)))),
        ("trilrank2last", lambda i, j: not (i == j or i >= 4)),
        ("triurank2last", lambda i, j: not (i == j or j >= 4)),
    ],
)
def test_corners(name, zero):
    A = structure(name)(6).map(torch.ones_like).dense()
    assert A.tolist() == [[0.0 if zero(i, j) else 1.0 for j in range(6)] for i in range(6)]


def test_classes_and_functions_are_structures():
    assert structure(Dense).name == "dense"
    assert structure(BlockDiagonal).name == "BlockDiagonal"

    def wide_blocks(n, **kw):
        return BlockDiagonal.eye(n, k=100, **kw)

    assert structure(wide_blocks).name == "wide_blocks"
    assert structure(wide_blocks)(250).blocks.shape == (2, 100, 100)


def test_registering():
    register_structure("circulant", Circulant)
    assert structure("circulant") is registered_structures()["circulant"]
    assert structure(Circulant).name == "circulant"
    with pytest.raises(
        ValueError, match="The structure name 'dense' is taken; choose another one."
    ):
        register_structure("dense", Circulant)
    with pytest.raises(ValueError, match="The structure name 'block7diagonal' is taken"):
        register_structure("block7diagonal", Circulant)


@pytest.mark.parametrize(
    "name", ["blok30", "block0diagonal", "hierarchical4", "Dense", "rank-1", ""]
)
def test_unknown_names(name):
    with pytest.raises(ValueError) as raised:
        structure(name)
    assert repr(name) in str(raised.value) and "\n" not in str(raised.value)


def test_unknown_kinds():
    with pytest.raises(
        TypeError, match="A structure must be a name, a class or a function of n, got 30."
    ):
        structure(30)


def test_functions_have_a_name_that_lasts_or_are_refused():
    wide = functools.partial(BlockDiagonal.eye, k=100)
    assert structure(wide).name == "BlockDiagonal.eye(k=100)"
    assert structure(functools.partial(wide, k=50)).name == "BlockDiagonal.eye(k=50)"
    assert structure(wide)(250).blocks.shape == (2, 100, 100)
    assert structure(BlockDiagonal.eye).name == "BlockDiagonal.eye"

    class Maker:
        def __call__(self, n, **kw):
            return Dense.eye(n, **kw)

    for nameless in (
        lambda n, **kw: Dense.eye(n, **kw),
        Maker(),
        functools.partial(lambda k, n, **kw: BlockDiagonal.eye(n, k=k, **kw), 3),
        functools.partial(BlockDiagonal.eye, k=torch.tensor(3)),
    ):
        with pytest.raises(
            ValueError, match="no name that a checkpoint could keep; make it by"
        ) as e:
            structure(nameless)
        assert "\n" not in str(e.value)
    named = register_structure("named", nameless)
    try:
        assert structure(nameless) is structure("named") is named
    finally:
        registry._REGISTRY.pop("named")


def test_a_user_declares_what_is_no_tensor():
    @dataclass(eq=False, repr=False)
    class ScaledIdentity(StructuredMatrix):
        s: torch.Tensor
        size: int = static()
        words: str = static(default="s I")

        @classmethod
        def eye(cls, n, **kw):
            return cls(torch.ones(1, **kw), n)

        @property
        def n(self):
            return self.size

        def mm(self, X):
            return self.s * X

        tmm = mm

        def compose(self, other):
            return type(self)(self.s * other.s, self.size)

        def project(self, Y):
            return type(self)(Y.square().sum().view(1) / self.n, self.size)

        def trace(self):
            return self.n * self.s[0].float()

    A = structure(ScaledIdentity)(5, dtype=torch.float64)
    assert A.numel == 1 and len(A.tensors()) == 1
    B = (A * 3.0 + A).to(dtype=torch.float32)
    assert B.size == 5 and B.words == "s I" and B.dtype == torch.float32
    assert torch.equal(B.dense(), 4 * torch.eye(5))
    assert A.from_flat(torch.ones(1)).n == 5
    with pytest.raises(TypeError, match="not of one structure and size"):
        A @ ScaledIdentity.eye(6)
