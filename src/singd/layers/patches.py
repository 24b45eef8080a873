"""The patches that a convolution sees, as rows that need not be unfolded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from singd.layers.rows import Rows

CHUNK_BYTES = 8 * 2**20
"""How much is unfolded at a time where the unfolding cannot be avoided."""


def windows(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """All places of a kernel on the last dimensions of x, as a view.

    Args:
        x: [..., *n] with as many last dimensions as the kernel has.
        kernel: Sizes of the kernel.
        stride: Steps from place to place.
        dilation: Steps inside of the kernel.

    Returns:
        [..., *o, *k] with `out[..., o, k] = x[..., o * stride + k * dilation]`.
    """
    first = x.ndim - len(kernel)
    for i, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(first + i, (k - 1) * d + 1, s)[..., ::d]
    return x


def window_sums(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """The sums of `windows` over all places, [..., *k], one axis after the other."""
    first = x.ndim - len(kernel)
    for k, s, d in zip(kernel, stride, dilation, strict=True):
        x = x.unfold(first, (k - 1) * d + 1, s)[..., ::d].sum(first)
    return x


class PatchRows(Rows):
    """One row per output position: the patch of the padded input under the kernel, channel-major.

    Args:
        padded: The input with its padding, [B, C, *n].
        kernel: The kernel's sizes, one per axis.
        stride: Steps from position to position.
        dilation: Steps inside of the kernel.
    """

    def __init__(
        self, padded: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
    ) -> None:
        self._padded = padded
        self._geometry = tuple(kernel), tuple(stride), tuple(dilation)
        self._windows = windows(padded, *self._geometry)  # [B, C, *o, *k], a view

    @property
    def positions(self) -> tuple[int, ...]:
        """The numbers of output positions, one per axis."""
        return self._windows.shape[2 : self._padded.ndim]

    @property
    def count(self) -> int:
        return self._padded.shape[0] * torch.Size(self.positions).numel()

    @property
    def width(self) -> int:
        return self._padded.shape[1] * torch.Size(self._geometry[0]).numel()

    def matrix(self) -> Tensor:
        axes = range(2, self._padded.ndim)
        kernel_axes = range(self._padded.ndim, self._windows.ndim)
        # A transposed [d, m] is written strip by strip, an [m, d] number by number.
        across = self._windows.permute(1, *kernel_axes, 0, *axes)
        return across.reshape(self.width, self.count).T

    def gram(self) -> Tensor:
        total = self._padded.new_zeros(self.width, self.width)
        for part in self.split():
            X = part.matrix().T
            total.addmm_(X, X.T)
        return total

    def squares(self) -> Tensor:
        return self._window_totals(self._padded.square())

    def sums(self) -> Tensor:
        return self._window_totals(self._padded)

    def mean_patches(self) -> Tensor:
        """The mean of the patches over the positions, [B, d]."""
        sums = window_sums(self._padded, *self._geometry)
        return sums.flatten(1) / torch.Size(self.positions).numel()

    def split(self) -> Iterator[Rows]:
        batch = self._padded.shape[0]
        per_example = self.width * torch.Size(self.positions).numel() * self._padded.element_size()
        step = max(1, CHUNK_BYTES // max(1, per_example))
        if batch <= step:
            yield self
            return
        for part in self._padded.split(step):
            yield PatchRows(part, *self._geometry)

    def _window_totals(self, t: Tensor) -> Tensor:
        """The sums of t [B, C, *n] over batch and positions, [d]."""
        # The batch first, which leaves next to nothing to slide over; in float32 at least.
        wide = torch.promote_types(t.dtype, torch.float32)
        return window_sums(t.sum(0, dtype=wide), *self._geometry).flatten().to(t.dtype)
