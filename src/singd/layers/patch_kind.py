"""What all convolutions share: they are linear in the patches of a padded input."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, TypeAlias

import torch
from torch import Size, Tensor, nn

from singd.layers.base import Approx, LayerKind
from singd.layers.patches import PatchRows
from singd.layers.rows import DenseRows, Rows, WithOnes

Conv: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d
ConvTranspose: TypeAlias = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


class PatchKind(LayerKind):
    """Layers that slide a kernel over a padded input: one shared position per place of the kernel.

    The channel groups share one input factor: their patches are averaged. The law of `LayerKind`
    then holds for each group's own patches instead.
    """

    @abstractmethod
    def padded(self, layer: Any, x: Tensor, output_shape: Size | None) -> Tensor:
        """The input x [B, C_in, *n] as the kernel meets it, with all its padding."""

    @abstractmethod
    def stride(self, layer: Any) -> tuple[int, ...]:
        """The kernel's steps over the padded input."""

    def patches(
        self,
        layer: Any,
        x: Tensor,
        dtype: torch.dtype,
        output_shape: Size | None = None,
    ) -> PatchRows:
        """The patches of x [(B,) C_in, *n], averaged over the channel groups."""
        batched = x if x.ndim == len(layer.kernel_size) + 2 else x[None]
        padded = self.padded(layer, batched, output_shape).to(dtype)
        if layer.groups > 1:
            padded = padded.unflatten(1, (layer.groups, -1)).mean(1)
        return PatchRows(padded, layer.kernel_size, self.stride(layer), layer.dilation)

    def inputs(self, layer: Any, x: Tensor) -> Tensor:
        patches = self.patches(layer, x, x.dtype)
        shared = Size(patches.positions).numel()
        return patches.matrix().unflatten(0, (patches.count // shared, shared))

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
