"""Triangular Toeplitz products on a CPU: by the matrix itself where it is small, else by FFT in the cache.

Each constant was found with one thread of an x86 CPU and float32; ``tests/benchmarks/kernels.py`` says what each
trick saves of a whole training step.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.fft import irfft, rfft

from singd.kernels.registry import register_kernel

SMALL = 256
"""Up to this n a product with the n x n matrix itself takes less time than one by FFT."""
CHUNK = 2**17
"""So many numbers are transformed at a time: they stay in the cache, which halves the time."""


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _dense(t: Tensor, upper: bool) -> Tensor:
    """The Toeplitz matrix with t, [n], as its first row (column, if not ``upper``) and zeros elsewhere."""
    padded = torch.cat([t.new_zeros(len(t) - 1), t])
    matrix = padded.unfold(0, len(t), 1).flip(0)
    return matrix if upper else matrix.T


def toeplitz_mm(X: Tensor, *factors: tuple[Tensor, bool]) -> Tensor:
    """See `kernels.toeplitz_mm`; the result is stored row by row if X is, else column by column."""
    n, m = X.shape
    if n <= SMALL and m > 1:
        for t, upper in factors:
            X = _dense(t, upper) @ X
        return X
    length = _fast_length(2 * n - 1)
    spectra = []
    for t, upper in factors:
        spectrum = rfft(t.to(_wide(t)), length)
        spectra.append(spectrum.conj().resolve_conj() if upper else spectrum)
    # along contiguous rows: a transform along the columns of a matrix takes more than twice as long, and
    # torch transposes a whole matrix faster than its parts
    columns = X.T.contiguous()
    out = X.new_empty(m, n, dtype=torch.promote_types(factors[0][0].dtype, X.dtype))
    step = max(1, CHUNK // length)
    for source, target in zip(columns.split(step), out.split(step), strict=True):
        rows = source.to(_wide(X))
        for spectrum in spectra:
            rows = irfft(rfft(rows, length).mul_(spectrum), length)[:, :n]
        target.copy_(rows)
    return out.T.contiguous() if X.is_contiguous() else out.T


def diagonal_sums(Y: Tensor) -> Tensor:
    """See `kernels.diagonal_sums`."""
    n, m = Y.shape
    if n <= SMALL and m > 2:
        # zeros where a shifted row would leave the matrix
        padded = torch.nn.functional.pad(Y @ Y.T, (0, n))
        return padded.as_strided((n, n), (2 * n + 1, 1)).sum(0)
    length = _fast_length(2 * n - 1)
    power = Y.new_zeros(length // 2 + 1)
    for rows in Y.T.split(max(1, CHUNK // length)):
        spectrum = rfft(rows.contiguous(), length)
        power += torch.view_as_real(spectrum).square().sum(dim=(0, 2))
    return irfft(power, length)[:n]


@cache
def _fast_length(n: int) -> int:
    """The smallest length of at least n that is 16 times a product of twos, threes and fives."""
    length = 16 * -(-n // 16)
    while True:
        rest = length
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return length
        length += 16


def _has_columns(X: Tensor, *factors: tuple[Tensor, bool]) -> bool:
    """Whether there is anything to transform, which some libraries refuse otherwise."""
    return X.numel() > 0


register_kernel("toeplitz_mm", "cpu", toeplitz_mm, _has_columns)
register_kernel("diagonal_sums", "cpu", diagonal_sums, _has_columns)
