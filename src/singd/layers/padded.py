"""An input with its padding, which is made when it is needed and for a few examples at a time.

Padding only puts entries elsewhere, repeats them or adds zeros. It therefore commutes with everything that
is done entry by entry, or summed over examples or channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Size, Tensor

CHUNK_BYTES = 2 * 2**20
"""How much is padded and unfolded at a time; so much also stays in the cache."""


@dataclass(frozen=True, eq=False)
class PaddedInput:
    """What a kernel slides over.

    Attributes:
        x: The input, [B, ...].
        pad: Pads the last dimensions of any tensor [*, *, ...] with the input's sizes.
        shape: The shape (C, *n) of one padded example.
        groups: How many groups of C channels the input has; their mean is what the kernel meets.
        dtype: The dtype after padding.
        zeros: For each axis, how many rows at its start and its end are known to be zero.
    """

    x: Tensor
    pad: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    groups: int
    dtype: torch.dtype
    zeros: list[tuple[int, int]]

    @property
    def batch(self) -> int:
        """The number of examples B."""
        return len(self.x)

    def tensor(self) -> Tensor:
        """The padded input, [B, C, *n]."""
        return self.pad(self.unpadded())

    def unpadded(self) -> Tensor:
        """The input before its padding, averaged over the groups: [B, C, ...]."""
        x = self.x.to(self.dtype)
        return x if self.groups == 1 else x.unflatten(1, (self.groups, -1)).mean(1)

    def channels(self, first: int, last: int) -> PaddedInput:
        """Some of the C channels."""
        some = self.unpadded()[:, first:last]
        return replace(self, x=some, shape=(last - first, *self.shape[1:]), groups=1)

    def split(self, growth: float) -> Iterator[PaddedInput]:
        """Parts of the batch small enough to work on.

        Args:
            growth: How many numbers are made of each number of the padded input.
        """
        bytes_each = Size(self.shape).numel() * self.dtype.itemsize * growth
        for part in self.x.split(max(1, int(CHUNK_BYTES / max(1, bytes_each)))):
            yield replace(self, x=part)
