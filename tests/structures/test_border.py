"""Block-triangular matrices as a diagonal with a border of rows, against the recursion over their blocks."""

import pytest
import torch
from structure_cases import STRUCTURES, member

from singd.layers import DenseRows
from singd.structures import BlockDiagonal, Diagonal, Upper
from singd.structures.border import Border

F64 = torch.float64
BORDERED = [n for n in STRUCTURES if n.startswith(("trilrank", "triurank", "hierarchical"))]


def results(A, B, X, rows):
    return {
        "outer": A.outer(X),
        "co_outer": A.co_outer(X),
        "sandwich": A.sandwich(rows).dense(),
        "co_sandwich": A.co_sandwich(rows).dense(),
        "gram": A.gram().dense(),
        "cogram": A.cogram().dense(),
        "compose": (A @ B).dense(),
    }


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("m", [0, 1, 6, 50])
@pytest.mark.parametrize("n", [1, 2, 5, 9, 23, 67])
@pytest.mark.parametrize("name", BORDERED)
def test_border_and_recursion_agree(monkeypatch, name, n, m, wide):
    monkeypatch.setattr(Border, "_wide", wide)
    A, B = member(name, n), member(name, n)
    assert A.border() is not None or A.T.border() is not None
    X, rows = torch.randn(n, m, dtype=F64), DenseRows(torch.randn(m, n, dtype=F64))
    fast = results(A, B, X, rows)
    monkeypatch.setattr(Upper, "_form", lambda self: (None, False))
    plain = results(A, B, X, rows)
    for what, expected in plain.items():
        torch.testing.assert_close(fast[what], expected, rtol=0, atol=1e-12, msg=what)


def test_other_blocks_have_no_border():
    A = Upper.eye(7, k=3, first=BlockDiagonal.eye, second=Diagonal.eye)
    assert A.border() is None and A.border(transposed=True) is None
    assert A.outer_product() is None
