"""Half of a symmetric product, and the routes of dense factors that use it, against the plain formulas."""

import pytest
import torch

from singd import products
from singd.layers import DenseRows
from singd.products import symmetric
from singd.structures import Dense

F64 = torch.float64


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of three, so that small matrices have many of them and an incomplete last one."""
    monkeypatch.setattr(products, "BLOCK", 3)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13 * expected.abs().max().item())


@pytest.mark.parametrize("n", [1, 5, 6, 7, 12, 20])
@pytest.mark.parametrize("m", [0, 2, 3, 8, 31])
def test_half_a_product_is_the_whole(small_blocks, n, m):
    A, S = torch.randn(n, m, dtype=F64), torch.randn(m, m, dtype=F64)
    assert_same = torch.testing.assert_close
    assert_same(symmetric(A, A.T), A @ A.T)
    assert_same(symmetric(A, (S + S.T) @ A.T), A @ ((S + S.T) @ A.T))
    B = A.T.contiguous().T  # columns are contiguous instead of rows
    assert_same(symmetric(B, B.T), A @ A.T)


def test_halving_is_what_happens(small_blocks):
    # of a product that is not symmetric, the lower half counts
    A, B = torch.randn(9, 8, dtype=F64), torch.randn(8, 9, dtype=F64)
    assert products.halving_pays(9, 8, A.device)
    lower = (A @ B).tril()
    blocks = symmetric(A, B)
    torch.testing.assert_close(blocks.tril(-3), lower.tril(-3))
    assert not torch.allclose(blocks, A @ B)
    assert not products.halving_pays(9, 8, torch.device("meta"))


@pytest.mark.parametrize("n", [1, 7, 13])
@pytest.mark.parametrize("m", [1, 5, 10, 19, 40])
def test_dense_routes(small_blocks, n, m):
    K, A, X = (torch.randn(*s, dtype=F64) for s in ((n, n), (m, n), (n, m)))
    rows = DenseRows(A)
    close(Dense(K).sandwich(rows).a, K.T @ A.T @ A @ K)
    close(Dense(K).co_sandwich(rows).a, K @ A.T @ A @ K.T)
    close(Dense(K).outer(X), K @ K.T @ X)
    close(Dense(K).gram().a, K.T @ K)
    close(Dense(K).cogram().a, K @ K.T)
    close(rows.gram(), A.T @ A)
