"""The patches that a convolution sees, as rows that need not be unfolded."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Size, Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from singd.layers.padded import PaddedInput
from singd.layers.patch_gram import shifted_gram
from singd.layers.rows import Narrowed, Rows, wide
from singd.layers.shifted_products import cheapest_plan
from singd.layers.windows import Kernel, window_sums, windows
from singd.products import add_symmetric_, as_rows, mirror_, multiply


class PatchRows(Rows):
    """One row per output position: the patch of the padded input under the kernel, channel-major.

    Args:
        padded: The padded input.
        kernel: The kernel that slides over it.
    """

    def __init__(self, padded: PaddedInput, kernel: Kernel) -> None:
        self._padded, self._kernel = padded, kernel
        self.positions = tuple(kernel.places(i, n) for i, n in enumerate(padded.shape[1:]))
        self.shared = Size(self.positions).numel()

    @property
    def count(self) -> int:
        return self._padded.batch * self.shared

    @property
    def width(self) -> int:
        return self._padded.shape[0] * self._kernel.numel

    def matrix(self) -> Tensor:
        return _unfold(self._padded.tensor(), self._kernel)

    def columns(self, start: int, stop: int) -> Tensor:
        some, skipped = self._of_channels(start, stop)
        return some.matrix()[:, start - skipped : stop - skipped]

    def narrow(self, start: int, stop: int) -> Rows:
        some, skipped = self._of_channels(start, stop)
        return Narrowed(some, start - skipped, stop - skipped)

    def gram(self) -> Tensor:
        padded = self._padded
        plan = cheapest_plan(self._kernel, (padded.batch, *padded.shape), padded.zeros)
        if plan is not None:
            return shifted_gram(padded, self._kernel, plan)
        total = self._zeros(self.width, self.width)
        for part in self.split():
            X = part.matrix().T
            add_symmetric_(total, X, X.T)
        return mirror_(total).to(padded.dtype)

    def squares(self) -> Tensor:
        return self._window_totals(lambda x, dtype: x.square().sum(0, dtype=dtype))

    def sums(self) -> Tensor:
        return self._window_totals(lambda x, dtype: x.sum(0, dtype=dtype))

    def tmm(self, Y: Tensor) -> Tensor:
        if not Y.numel():  # which a convolution refuses
            return Y.new_zeros(self.width, Y.shape[1])
        # A^T Y is the weight's gradient of a convolution whose output has the gradient Y.
        weight_grad = (conv1d_weight, conv2d_weight, conv3d_weight)[len(self.positions) - 1]
        size, stride, dilation = self._kernel
        shape = Size((Y.shape[1], self._padded.shape[0], *size))
        g = Y.T.unflatten(1, (self._padded.batch, *self.positions)).transpose(0, 1)
        out = weight_grad(self._padded.tensor(), shape, g, stride=stride, dilation=dilation)
        return out.flatten(1).T

    def mm(self, Y: Tensor) -> Tensor:
        return torch.cat([multiply(part.matrix(), Y).T for part in self.split()], dim=1).T

    def mean_patches(self) -> Tensor:
        """The mean of the patches over the positions, [B, d]."""
        parts = self._padded.split(growth=2.0)
        sums = [window_sums(part.tensor(), self._kernel).flatten(1) for part in parts]
        return torch.cat(sums) / self.shared

    def split(self) -> Iterator[Rows]:
        growth = self.width * self.shared / Size(self._padded.shape).numel()
        return (PatchRows(part, self._kernel) for part in self._padded.split(1.0 + growth))

    def _of_channels(self, start: int, stop: int) -> tuple[PatchRows, int]:
        """The patches of those channels that some columns belong to, and how many columns are before them."""
        channels, k = self._padded.shape[0], self._kernel.numel
        first = min(start // k, channels - 1)  # one channel at least, as no padding takes none
        last = max(first + 1, -(-stop // k))
        if last - first == channels:
            return self, 0
        return PatchRows(self._padded.channels(first, last), self._kernel), first * k

    def _window_totals(self, over_batch: Callable[[Tensor, torch.dtype], Tensor]) -> Tensor:
        """Sums over batch and positions, [d], given the sum over the batch."""
        # The batch first, which leaves next to nothing to pad and to slide over.
        padded, total = self._padded, None
        for part in padded.split(growth=2.0):
            sums = over_batch(part.unpadded(), wide(padded.dtype))
            total = sums if total is None else total.add_(sums)
        assert total is not None  # an empty batch is one part
        total = padded.pad(total[None])[0]
        return window_sums(total, self._kernel).flatten().to(padded.dtype)

    def _zeros(self, *shape: int) -> Tensor:
        """Where to sum up."""
        return self._padded.x.new_zeros(shape, dtype=wide(self._padded.dtype))


def _unfold(padded: Tensor, kernel: Kernel) -> Tensor:
    """The patches of a padded input [B, C, *n], [m, d]."""
    view = windows(padded, kernel)  # [B, C, *o, *k]
    places, offsets = range(2, padded.ndim), range(padded.ndim, view.ndim)
    # A transposed [d, m] is written strip by strip, an [m, d] number by number.
    return as_rows(view.permute(1, *offsets, 0, *places), 1 + len(offsets)).T
