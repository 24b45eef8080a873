"""What the window of a convolution meets while it slides over a padded input.

Padding only puts entries elsewhere, repeats them or adds zeros. It therefore commutes with everything that
is done entry by entry, or summed over examples or channels, and is put off until it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Size, Tensor

from singd.kernels.registry import kernel


class Window(NamedTuple):
    """A kernel's extent; each field has one number per axis.

    Attributes:
        size: Its sizes k.
        stride: The steps from place to place.
        dilation: The steps inside of it.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of entries."""
        return Size(self.size).numel()

    def output_size(self, axis: int, n: int) -> int:
        """How many places it has along an axis of size n."""
        return (n - (self.size[axis] - 1) * self.dilation[axis] - 1) // self.stride[axis] + 1

    def without(self, axis: int) -> Window:
        """The window on the other axes."""
        return Window(*(field[:axis] + field[axis + 1 :] for field in self))


@dataclass(frozen=True, eq=False)
class Patches:
    """An input and the window that slides over it.

    Attributes:
        x: The input before its padding, [B, C, ...].
        pad: Pads any tensor [*, *, ...] with the input's last sizes.
        sizes: The sizes *n of the padded input.
        zeros: For each axis, how many rows at its start and its end are known to be zero.
        window: The window.
    """

    x: Tensor
    pad: Callable[[Tensor], Tensor]
    sizes: tuple[int, ...]
    zeros: list[tuple[int, int]]
    window: Window

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def places(self) -> Size:
        """How many places the window has along each axis."""
        return Size(self.window.output_size(i, n) for i, n in enumerate(self.sizes))

    @property
    def width(self) -> int:
        """How many numbers a patch has, d."""
        return self.x.shape[1] * self.window.numel

    def padded(self) -> Tensor:
        """The padded input, [B, C, *n]."""
        return self.pad(self.x)

    def unfold(self) -> Tensor:
        """All patches as columns, channel-major, [d, B * places]."""
        view = windows(self.padded(), self.window)  # [B, C, *places, *k]
        places, offsets = range(2, self.x.ndim), range(self.x.ndim, view.ndim)
        columns = view.permute(1, *offsets, 0, *places)
        return columns.flatten(1 + len(offsets)).flatten(0, len(offsets))

    def split(self, growth: float) -> Iterator[Patches]:
        """Parts of the batch, which stacked are this one, small enough to work on where that is faster.

        Args:
            growth: How many numbers are made of each number of the padded input.
        """
        bytes_each = self.x.shape[1] * Size(self.sizes).numel() * self.x.element_size() * growth
        return (replace(self, x=part) for part in batches(self.x, bytes_each))


@kernel
def batches(x: Tensor, bytes_each: float) -> tuple[Tensor, ...]:
    """A batch x [B, ...] in parts, of examples that take so much memory each: all of it in one."""
    return (x,)


def windows(x: Tensor, window: Window) -> Tensor:
    """All places of a window on the last dimensions of x, as a view.

    Args:
        x: [..., *n] with as many last dimensions as the window has.
        window: The window.

    Returns:
        [..., *o, *k] with `out[..., o, k] = x[..., o * stride + k * dilation]`.
    """
    first = x.ndim - len(window.size)
    for i, (k, s, d) in enumerate(zip(*window, strict=True)):
        x = x.unfold(first + i, (k - 1) * d + 1, s)[..., ::d]
    return x
