"""Half of a symmetric product, and the routes of dense factors that use it, against the plain formulas."""

import pytest
import torch

from singd.kernels import cpu_products
from singd.kernels.cpu_products import matmul_symmetric
from singd.rows import DenseRows, WithOnes
from singd.structures import Dense

F64 = torch.float64


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of three, so that small matrices have many of them and an incomplete last one."""
    monkeypatch.setattr(cpu_products, "BLOCK", 3)
    monkeypatch.setattr(cpu_products, "LEAST", 10)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13 * expected.abs().max().item())


@pytest.mark.parametrize("n", [1, 5, 6, 7, 12, 20])
@pytest.mark.parametrize("m", [0, 2, 3, 8, 31])
def test_half_a_product_is_the_whole(small_blocks, n, m):
    A, S = torch.randn(n, m, dtype=F64), torch.randn(m, m, dtype=F64)
    assert_same = torch.testing.assert_close
    assert_same(matmul_symmetric(A, A.T), A @ A.T)
    assert_same(matmul_symmetric(A, (S + S.T) @ A.T), A @ ((S + S.T) @ A.T))
    B = A.T.contiguous().T  # columns are contiguous instead of rows
    assert_same(matmul_symmetric(B, B.T), A @ A.T)


@pytest.mark.parametrize("n", [1, 5, 7, 20])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_halves_add_up_to_the_whole(small_blocks, n, dtype):
    parts = [torch.randn(n, m) for m in (0, 1, 8, 31)]  # of some, all of the product is formed
    total = torch.zeros(n, n, dtype=dtype)
    for L in parts:
        cpu_products.add_symmetric_(total, L, L.T)
    cpu_products.mirror_(total)
    A = torch.cat(parts, dim=1).to(dtype)
    torch.testing.assert_close(total, A @ A.T, rtol=0, atol=2e-5)


def test_halving_is_what_happens(small_blocks):
    # of a product that is not symmetric, the lower half counts
    A, B = torch.randn(9, 8, dtype=F64), torch.randn(8, 9, dtype=F64)
    assert cpu_products.halving_pays(9, 8)
    lower = (A @ B).tril()
    blocks = matmul_symmetric(A, B)
    torch.testing.assert_close(blocks.tril(-3), lower.tril(-3))
    assert not torch.allclose(blocks, A @ B)


@pytest.mark.parametrize("n", [1, 7, 13])
@pytest.mark.parametrize("m", [1, 5, 10, 19, 40])
def test_dense_routes(small_blocks, n, m):
    K, A, X = (torch.randn(*s, dtype=F64) for s in ((n, n), (m, n), (n, m)))
    rows = DenseRows(A)
    close(Dense(K).project_congruence(rows).a, K.T @ A.T @ A @ K)
    close(Dense(K).project_cocongruence(rows).a, K @ A.T @ A @ K.T)
    close(Dense(K).mm_AAt(X), K @ K.T @ X)
    close(Dense(K).gram().a, K.T @ K)
    close(Dense(K).cogram().a, K @ K.T)
    close(rows.gram(), A.T @ A)


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(16, 5, 17), (9, 4, 9), (1, 3, 40), (16, 16, 16), (20, 0, 11)])
def test_aligned_products(monkeypatch, sizes, dtype):
    monkeypatch.setattr(cpu_products, "ALIGNED", 2)  # small matrices count as large
    monkeypatch.setattr(cpu_products, "NARROW", 0)
    n, k, m = sizes
    A, B = torch.randn(n, k).to(dtype), torch.randn(k, m).to(dtype)
    for left in (A, A.T.contiguous().T):
        product = cpu_products.matmul(left, B)
        torch.testing.assert_close(product, left @ B)
        odd = m % 2 == 1 and n >= 16 and dtype != torch.bfloat16
        assert product.stride(0) == (m + 1 if odd and m >= 16 else m)


@pytest.mark.parametrize("m", [0, 1, 5, 16])
def test_narrow_products_are_stored_as_rows(m):
    A, B = torch.randn(16, 7, dtype=F64), torch.randn(7, m, dtype=F64)
    for left in (A, A.T.contiguous().T):
        product = cpu_products.matmul(left, B)
        torch.testing.assert_close(product, left @ B)
        assert m in (0, 16) or product.stride(0) == 1


@pytest.mark.parametrize("d", [1, 29, 30, 31, 32, 33, 60, 61, 62, 75, 95])
@pytest.mark.parametrize("k", [1, 7, 15, 28, 30, 31, 60])
def test_blocks_of_a_gram_matrix(d, k):
    # blocks near a multiple of 16 are multiplied with rows of the next block, where there is one
    A = torch.randn(20, d, dtype=F64)
    for rows in (DenseRows(A), WithOnes(DenseRows(A[:, 1:]))) if d > 1 else (DenseRows(A),):
        gram = rows.matrix().T @ rows.matrix()
        blocks, last = rows.block_gram(k)
        found = torch.block_diag(*blocks, last) if len(blocks) else last
        close(found, torch.block_diag(*(gram[i : i + k, i : i + k] for i in range(0, d, k))))
        assert blocks.shape == (d // k, k, k) and last.shape == (d % k, d % k)


def test_products_can_still_be_differentiated():
    A = torch.randn(257, 131, dtype=F64, requires_grad=True)
    cpu_products.matmul(A, A.T[:, :129]).sum().backward()
    matmul_symmetric(A, A.T).sum().backward()
    assert A.grad is not None
