"""Convolutions: linear in the patches of a padded input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Size, Tensor

from singd import kernels
from singd.kernels import Patches, Window
from singd.layers.base import Approx, LayerKind
from singd.rows import DenseRows, Rows


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
        some = replace(p, x=p.x[:, first:last])
        return some.unfold().T[:, start - first * k : stop - first * k]

    def split(self) -> Iterator[Rows]:
        return map(PatchRows, self.patches.split(self.width * self.shared))


class ConvKind(LayerKind):
    """`nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d` with all options: one shared position per place of the kernel.

    The channel groups share one input factor: their patches are averaged. The law of `LayerKind`
    then holds for each group's own patches instead.
    """

    def stride(self, layer: Any) -> tuple[int, ...]:
        """The kernel's steps over the padded input."""
        return layer.stride

    def extents(self, layer: Any, sizes: Size, output: Size | None) -> list[tuple[int, int, int]]:
        """For each axis, how much is padded before, the input's extent as the kernel meets it, and how much after.

        Args:
            layer: A layer of this kind.
            sizes: The input's sizes *n.
            output: The sizes of the output, where known.
        """
        if layer.padding == "valid":
            return [(0, n, 0) for n in sizes]
        if layer.padding == "same":  # an even kernel has one more behind than before
            return [
                (e // 2, n, e - e // 2) for n, e in zip(sizes, receptive_extent(layer), strict=True)
            ]
        return [(int(p), n, int(p)) for n, p in zip(sizes, layer.padding, strict=True)]

    def padded(self, layer: Any, x: Tensor, extents: list[tuple[int, int, int]]) -> Tensor:
        """A tensor x [B, C, *n] with any number of channels, padded; negative padding cuts off."""
        padding = [p for before, _, after in reversed(extents) for p in (before, after)]
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        return F.pad(x, padding, mode=mode)

    def patches(
        self, layer: Any, x: Tensor, dtype: torch.dtype, output_shape: Size | None = None
    ) -> PatchRows:
        """The patches of x [(B,) C_in, *n], averaged over the channel groups."""
        axes = len(layer.kernel_size)
        x = (x if x.ndim == axes + 2 else x[None]).to(dtype)
        if layer.groups > 1:
            x = x.unflatten(1, (layer.groups, -1)).mean(1)
        extents = self.extents(layer, x.shape[2:], output_shape and output_shape[-axes:])
        window = Window(layer.kernel_size, self.stride(layer), layer.dilation)
        pad = partial(self.padded, layer, extents=extents)
        known = layer.padding_mode == "zeros"
        zeros = [(max(0, b), max(0, a)) if known else (0, 0) for b, _, a in extents]
        return PatchRows(Patches(x, pad, Size(map(sum, extents)), window, zeros))

    def inputs(self, layer: Any, x: Tensor) -> Tensor:
        rows = self.patches(layer, x, x.dtype)
        return rows.matrix().unflatten(0, (len(rows.patches.x), rows.shared))

    def grads(self, layer: Any, g: Tensor) -> Tensor:
        batched = g if g.ndim == len(layer.kernel_size) + 2 else g[None]
        return batched.flatten(2).mT

    def bare_rows(
        self, layer: Any, x: Tensor, approx: Approx, dtype: torch.dtype, output_shape: Size | None
    ) -> Rows:
        rows = self.patches(layer, x, dtype, output_shape)
        return DenseRows(kernels.patch_means(rows.patches)) if approx == "reduce" else rows


def receptive_extent(layer: Any) -> list[int]:
    """How many entries the last one under the kernel is from the first one, along each axis."""
    return [d * (k - 1) for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
