"""Triangular Toeplitz products by FFT; on a CPU, a few columns at a time, which stay in its cache.

Each constant was found with one thread of an x86 CPU and float32; ``tests/benchmarks/kernels.py`` says what each
trick saves of a whole training step. The limit for other devices is a guess: products there start slowly.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.fft import irfft, rfft

from singd.kernels.registry import register_kernel
from singd.precision import wide_dtype

SMALL = {"cpu": 256, "other": 1024}
"""Up to this n a product with the n x n matrix itself takes less time than one by FFT."""
CHUNK = 2**17
"""So many numbers are transformed at a time on a CPU, which halves the time."""


def _step(X: Tensor, length: int) -> int:
    """How many columns to transform at a time."""
    return max(1, CHUNK // length if X.device.type == "cpu" else X.numel())


def toeplitz_mm(X: Tensor, *factors: tuple[Tensor, bool]) -> Tensor:
    """See `kernels.toeplitz_mm`; the result is stored row by row if X is, else column by column.

    Products with a lower triangular matrix are convolutions, those with an upper one correlations.
    """
    n, m = X.shape
    length = _fast_length(2 * n - 1)
    spectra = []
    for t, upper in factors:
        spectrum = rfft(t.to(wide_dtype(t.dtype)), length)
        spectra.append(spectrum.conj().resolve_conj() if upper else spectrum)
    # along contiguous rows: a transform along the columns of a matrix takes more than twice as long, and
    # torch transposes a whole matrix faster than its parts
    columns = X.T.contiguous()
    out = X.new_empty(m, n, dtype=torch.promote_types(factors[0][0].dtype, X.dtype))
    step = _step(X, length)
    for source, target in zip(columns.split(step), out.split(step), strict=True):
        rows = source.to(wide_dtype(X.dtype))
        for spectrum in spectra:
            rows = irfft(rfft(rows, length).mul_(spectrum), length)[:, :n]
        target.copy_(rows)
    return out.T.contiguous() if X.is_contiguous() else out.T


def correlation(x: Tensor, t: Tensor) -> Tensor:
    """See `kernels.correlation`: in float64 where the device has it, since the terms cancel for j near n."""
    dtype = x.dtype if x.device.type == "mps" else torch.float64
    length = _fast_length(2 * len(t) - 1)
    product = rfft(x.to(dtype), length) * rfft(t.to(dtype), length).conj()
    return irfft(product, length)[: len(t)].to(x.dtype)


def diagonal_sums(Y: Tensor) -> Tensor:
    """See `kernels.diagonal_sums`: the correlation of each column with itself."""
    length = _fast_length(2 * len(Y) - 1)
    power = Y.new_zeros(length // 2 + 1)
    for rows in Y.T.split(_step(Y, length)):
        spectrum = rfft(rows.contiguous(), length)
        power += torch.view_as_real(spectrum).square().sum(dim=(0, 2))
    return irfft(power, length)[: len(Y)]


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


def _pays(X: Tensor, *_: object) -> bool:
    """Whether X is large, and not empty, which some libraries refuse to transform."""
    return X.numel() > 0 and len(X) > SMALL["cpu" if X.device.type == "cpu" else "other"]


for device in ("cpu", "any"):
    register_kernel("toeplitz_mm", device, toeplitz_mm, _pays)
    register_kernel("correlation", device, correlation, _pays)
    register_kernel("diagonal_sums", device, diagonal_sums, _pays)
