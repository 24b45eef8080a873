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

CHUNK_BYTES = 2 * 2**20
"""How much is padded and unfolded at a time on a CPU; so much also stays in the cache."""


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
        window: The window.
        zeros: For each axis, how many rows at its start and its end are known to be zero.
    """

    x: Tensor
    pad: Callable[[Tensor], Tensor]
    sizes: Size
    window: Window
    zeros: list[tuple[int, int]]

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
        return unfold(self.padded(), self.window)

    def split(self, unfolded: float = 0.0) -> Iterator[Patches]:
        """Parts of the batch, which stacked are this one: so small on a CPU that they stay in its cache.

        Args:
            unfolded: How many numbers will be made of each example, beside the padded input.
        """
        padded = self.x.shape[1] * self.sizes.numel()
        bytes_each = max(1.0, self.x.element_size() * (padded + unfolded))
        most = int(CHUNK_BYTES / bytes_each) if self.device.type == "cpu" else len(self.x)
        return (replace(self, x=part) for part in self.x.split(max(1, most)))


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


def unfold(x: Tensor, window: Window) -> Tensor:
    """The patches of x [B, C, *rest, *n] as columns: [C * k, *rest, B * places]."""
    view, axes = windows(x, window), len(window.size)  # [B, C, *rest, *o, *k]
    rest, places = range(2, x.ndim - axes), range(x.ndim - axes, x.ndim)
    columns = view.permute(1, *range(x.ndim, view.ndim), *rest, 0, *places)
    return columns.flatten(1 + axes + len(rest)).flatten(0, axes)
