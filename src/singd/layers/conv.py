"""Convolutions: linear in the patches of a padded input."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn

from singd import kernels
from singd.kernels import Patches, Window
from singd.layers.base import Approx, LayerKind
from singd.rows import DenseRows, Rows, WithOnes

Conv: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d


class PatchRows(Rows):
    """One row per output position: the patch of the padded input under the kernel, channel-major.

    Args:
        patches: The input and the window that slides over it.
    """

    def __init__(self, patches: Patches) -> None:
        self.patches, self.shared = patches, patches.places.numel()
        self.count, self.width = len(patches.x) * self.shared, patches.width

    def matrix(self) -> Tensor:
        # A transposed [d, m] is written strip by strip, an [m, d] number by number.
        return self.patches.unfold().T

    def gram(self) -> Tensor:
        return kernels.patch_gram(self.patches)

    def squares(self) -> Tensor:
        return kernels.patch_sums(self.patches, squared=True)

    def sums(self) -> Tensor:
        return kernels.patch_sums(self.patches, squared=False)

    def tmm(self, Y: Tensor) -> Tensor:
        return kernels.patch_tmm(self.patches, Y)

    def mm(self, Y: Tensor) -> Tensor:
        return torch.cat([kernels.matmul(part.matrix(), Y).T for part in self.split()], dim=1).T

    def columns(self, start: int, stop: int) -> Tensor:
        # only the channels that some of the columns belong to; one at least, as no padding takes none
        p, k = self.patches, self.patches.window.numel
        first = min(start // k, p.x.shape[1] - 1)
        last = max(first + 1, -(-stop // k))
        some = Patches(p.x[:, first:last], p.pad, p.sizes, p.zeros, p.window)
        return some.unfold().T[:, start - first * k : stop - first * k]

    def split(self) -> Iterator[Rows]:
        p = self.patches
        growth = p.window.numel * self.shared / max(1, Size(p.sizes).numel())
        return (PatchRows(part) for part in p.split(1.0 + growth))


class PatchKind(LayerKind):
    """Layers that slide a kernel over a padded input: one shared position per place of the kernel.

    The channel groups share one input factor: their patches are averaged. The law of `LayerKind`
    then holds for each group's own patches instead.
    """

    @abstractmethod
    def stride(self, layer: Any) -> tuple[int, ...]:
        """The kernel's steps over the padded input."""

    @abstractmethod
    def padding(self, layer: Any, sizes: Size, output: Size | None) -> list[tuple[int, int]]:
        """How much to add to each axis before and after; negative to cut off.

        Args:
            layer: A layer of this kind.
            sizes: The input's sizes *n as the kernel meets them, before any padding: see `spaced`.
            output: The sizes of the output, where known.
        """

    @abstractmethod
    def padded(self, layer: Any, x: Tensor, padding: list[tuple[int, int]]) -> Tensor:
        """A tensor x [B, C, *n] with any number of channels, spaced and padded."""

    def spaced(self, layer: Any, sizes: Size) -> Size:
        """The input's sizes *n as the kernel meets them, before any padding."""
        return sizes

    def patches(
        self, layer: Any, x: Tensor, dtype: torch.dtype, output_shape: Size | None = None
    ) -> PatchRows:
        """The patches of x [(B,) C_in, *n], averaged over the channel groups."""
        axes = len(layer.kernel_size)
        x = (x if x.ndim == axes + 2 else x[None]).to(dtype)
        if layer.groups > 1:
            x = x.unflatten(1, (layer.groups, -1)).mean(1)
        sizes = self.spaced(layer, x.shape[2:])
        padding = self.padding(layer, sizes, None if output_shape is None else output_shape[-axes:])

        def pad(part: Tensor) -> Tensor:
            return self.padded(layer, part, padding)

        padded_sizes = tuple(n + sum(both) for n, both in zip(sizes, padding, strict=True))
        zero = layer.padding_mode == "zeros"
        zeros = [(max(0, b), max(0, a)) if zero else (0, 0) for b, a in padding]
        window = Window(layer.kernel_size, self.stride(layer), layer.dilation)
        return PatchRows(Patches(x, pad, padded_sizes, zeros, window))

    def inputs(self, layer: Any, x: Tensor) -> Tensor:
        rows = self.patches(layer, x, x.dtype)
        return rows.matrix().unflatten(0, (len(rows.patches.x), rows.shared))

    def grads(self, layer: Any, g: Tensor) -> Tensor:
        batched = g if g.ndim == len(layer.kernel_size) + 2 else g[None]
        return batched.flatten(2).mT

    def input_rows(
        self,
        layer: Any,
        x: Tensor,
        *,
        approx: Approx,
        bias: bool,
        dtype: torch.dtype,
        output_shape: Size | None = None,
    ) -> Rows:
        every = self.patches(layer, x, dtype, output_shape)
        mean = approx == "reduce"
        rows: Rows = DenseRows(kernels.patch_means(every.patches)) if mean else every
        return WithOnes(rows) if bias else rows


class ConvKind(PatchKind):
    """`nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d` with all their options."""

    def stride(self, layer: Conv) -> tuple[int, ...]:
        return layer.stride

    def padding(self, layer: Conv, sizes: Size, output: Size | None) -> list[tuple[int, int]]:
        if layer.padding == "valid":
            return [(0, 0)] * len(layer.kernel_size)
        if layer.padding == "same":  # an even kernel has one more behind than before
            return [(extent // 2, extent - extent // 2) for extent in receptive_extent(layer)]
        return [(int(p), int(p)) for p in layer.padding]

    def padded(self, layer: Conv, x: Tensor, padding: list[tuple[int, int]]) -> Tensor:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        return F.pad(x, for_torch(padding), mode=mode)


def receptive_extent(layer: Any) -> list[int]:
    """How many entries the last one under the kernel is from the first one, along each axis."""
    return [d * (k - 1) for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]


def for_torch(padding: list[tuple[int, int]]) -> list[int]:
    """Padding per axis in the order of `F.pad`, which begins at the last axis."""
    return [p for before_and_after in reversed(padding) for p in before_and_after]
