"""What all convolutions share: they are linear in the patches of a padded input."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, TypeAlias

import torch
from torch import Size, Tensor, nn

from singd.layers.base import Approx, LayerKind
from singd.layers.padded import PaddedInput
from singd.layers.patches import PatchRows
from singd.layers.rows import DenseRows, Rows, WithOnes
from singd.layers.windows import Kernel

Conv: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d
ConvTranspose: TypeAlias = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


class PatchKind(LayerKind):
    """Layers that slide a kernel over a padded input: one shared position per place of the kernel.

    The channel groups share one input factor: their patches are averaged. The law of `LayerKind`
    then holds for each group's own patches instead.
    """

    @abstractmethod
    def spread(self, layer: Any, sizes: Size) -> Size:
        """The input's sizes *n as the kernel meets them, before any padding."""

    @abstractmethod
    def padding(self, layer: Any, sizes: Size, output: Size | None) -> list[tuple[int, int]]:
        """How much to add to each axis before and after; negative to cut off.

        Args:
            layer: A layer of this kind.
            sizes: What `spread` says.
            output: The sizes of the output, where known.
        """

    @abstractmethod
    def padded(self, layer: Any, x: Tensor, padding: list[tuple[int, int]]) -> Tensor:
        """A tensor x [B, C, *n] with any number of channels, spread and padded."""

    @abstractmethod
    def stride(self, layer: Any) -> tuple[int, ...]:
        """The kernel's steps over the padded input."""

    def patches(
        self, layer: Any, x: Tensor, dtype: torch.dtype, output_shape: Size | None = None
    ) -> PatchRows:
        """The patches of x [(B,) C_in, *n], averaged over the channel groups."""
        axes, groups = len(layer.kernel_size), layer.groups
        batched = x if x.ndim == axes + 2 else x[None]
        output = None if output_shape is None else output_shape[-axes:]
        sizes = self.spread(layer, batched.shape[2:])
        padding = self.padding(layer, sizes, output)

        def pad(part: Tensor) -> Tensor:
            return self.padded(layer, part, padding)

        ends = zip(sizes, padding, strict=True)
        shape = (batched.shape[1] // groups, *(n + before + after for n, (before, after) in ends))
        zero = layer.padding_mode == "zeros"
        zeros = [(max(0, b), max(0, a)) if zero else (0, 0) for b, a in padding]
        kernel = Kernel(layer.kernel_size, self.stride(layer), layer.dilation)
        return PatchRows(PaddedInput(batched, pad, shape, groups, dtype, zeros), kernel)

    def inputs(self, layer: Any, x: Tensor) -> Tensor:
        patches = self.patches(layer, x, x.dtype)
        return patches.matrix().unflatten(0, (patches.count // patches.shared, patches.shared))

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
        patches = self.patches(layer, x, dtype, output_shape)
        rows = patches if approx == "expand" else DenseRows(patches.mean_patches())
        return WithOnes(rows) if bias else rows


def for_torch(padding: list[tuple[int, int]]) -> list[int]:
    """Padding per axis in the order of `F.pad`, which begins at the last axis."""
    return [p for before_and_after in reversed(padding) for p in before_and_after]
