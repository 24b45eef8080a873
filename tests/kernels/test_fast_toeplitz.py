"""Products and projections by FFT, in chunks, against the matrix itself."""

import pytest
import torch

from singd.kernels import fast_toeplitz
from singd.structures import UpperToeplitz

F64 = torch.float64


@pytest.fixture
def always_by_fft(monkeypatch):
    monkeypatch.setitem(fast_toeplitz.SMALL, "cpu", 0)


@pytest.mark.parametrize("chunk", [1, 100, 10**6])
@pytest.mark.parametrize("m", [0, 1, 2, 7])
@pytest.mark.parametrize("n", [1, 2, 5, 16, 33])
def test_fft_routes(always_by_fft, monkeypatch, n, m, chunk):
    monkeypatch.setattr(fast_toeplitz, "CHUNK", chunk)
    A, B = (UpperToeplitz(torch.randn(n, dtype=F64)) for _ in range(2))
    a, X = A.dense(), torch.randn(n, m, dtype=F64)
    pairs = [
        (A.mm(X), a @ X),
        (A.tmm(X), a.T @ X),
        (A.mm_AAt(X), a @ a.T @ X),
        (A.mm_AtA(X), a.T @ a @ X),
        (A.mm(X.T.contiguous().T), a @ X),
        ((A @ B).dense(), a @ B.dense()),
    ]
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    N, P = X @ X.T, A.project(X).t
    for j in range(n):
        expected = (1 if j == 0 else 2) * N.diagonal(j).mean()
        torch.testing.assert_close(P[j], expected, rtol=0, atol=1e-12)
