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


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(16, 5, 17), (9, 4, 9), (1, 3, 40), (16, 16, 16), (20, 0, 11)])
def test_aligned_products(monkeypatch, sizes, dtype):
    monkeypatch.setattr(products, "ALIGNED", 2)  # small matrices count as large
    n, k, m = sizes
    A, B = torch.randn(n, k).to(dtype), torch.randn(k, m).to(dtype)
    for left in (A, A.T.contiguous().T):
        product = products.multiply(left, B)
        torch.testing.assert_close(product, left @ B)
        odd = m % 2 == 1 and n >= 16 and dtype != torch.bfloat16
        assert product.stride(0) == (m + 1 if odd and m >= 16 else m)


def test_products_can_still_be_differentiated():
    A = torch.randn(257, 131, dtype=F64, requires_grad=True)
    products.multiply(A, A.T[:, :129]).sum().backward()
    symmetric(A, A.T).sum().backward()
    assert A.grad is not None
