"""A kernel that slides over a tensor, and all its places as a view."""

from __future__ import annotations

from typing import NamedTuple

from torch import Size, Tensor


class Kernel(NamedTuple):
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

    def places(self, axis: int, n: int) -> int:
        """How many places it has along an axis of size n."""
        return (n - (self.size[axis] - 1) * self.dilation[axis] - 1) // self.stride[axis] + 1

    def without(self, axis: int) -> Kernel:
        """The kernel on the other axes."""
        return Kernel(*(field[:axis] + field[axis + 1 :] for field in self))


def windows(x: Tensor, kernel: Kernel) -> Tensor:
    """All places of a kernel on the last dimensions of x, as a view.

    Args:
        x: [..., *n] with as many last dimensions as the kernel has.
        kernel: The kernel.

    Returns:
        [..., *o, *k] with `out[..., o, k] = x[..., o * stride + k * dilation]`.
    """
    first = x.ndim - len(kernel.size)
    for i, (k, s, d) in enumerate(zip(*kernel, strict=True)):
        x = x.unfold(first + i, (k - 1) * d + 1, s)[..., ::d]
    return x


def window_sums(x: Tensor, kernel: Kernel) -> Tensor:
    """The sums of `windows` over all places, [..., *k], one axis after the other."""
    first = x.ndim - len(kernel.size)
    for k, s, d in zip(*kernel, strict=True):
        x = x.unfold(first, (k - 1) * d + 1, s)[..., ::d].sum(first)
    return x
