"""Transposed convolutions."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Size, Tensor

from singd.layers.conv import ConvKind, receptive_extent


class ConvTransposeKind(ConvKind):
    """`nn.ConvTranspose1d`, `nn.ConvTranspose2d` and `nn.ConvTranspose3d`.

    A transposed convolution is a convolution of stride 1 with the mirrored kernel, over the input
    with stride - 1 zeros between its entries (Dumoulin and Visin, "A guide to convolution
    arithmetic for deep learning", arXiv 1603.07285, section 4). Its matrix therefore is that
    convolution's: a row per output channel, columns C_in/groups * kernel with the kernel mirrored.
    """

    def stride(self, layer: Any) -> tuple[int, ...]:
        return (1,) * len(layer.kernel_size)

    def extents(self, layer: Any, sizes: Size, output: Size | None) -> list[tuple[int, int, int]]:
        found = []
        for i, (n, extent) in enumerate(zip(sizes, receptive_extent(layer), strict=True)):
            inside, before = (n - 1) * layer.stride[i] + 1, extent - int(layer.padding[i])
            usual = inside + before - int(layer.padding[i]) + layer.output_padding[i]
            out = usual if output is None else output[i]
            found.append((before, inside, out + extent - before - inside))
        return found

    def padded(self, layer: Any, x: Tensor, extents: list[tuple[int, int, int]]) -> Tensor:
        # Each entry gets its zeros behind it, along axes of their own. What is around the input comes in whole
        # strides, in the same operator, and what is too much is cut off.
        padding: list[int] = []
        inside: list[Any] = [...]
        for s, (before, n, after) in zip(layer.stride, extents, strict=True):
            first, last = -(-before // s), -(-(after + 1 - s) // s)
            padding = [0, s - 1, first, last, *padding]
            start = first * s - before
            inside.append(slice(start, start + before + n + after))
        axes = [m for n in x.shape[2:] for m in (n, 1)]
        x = F.pad(x.reshape(*x.shape[:2], *axes), padding)
        axes = [n * s for n, s in zip(x.shape[2::2], x.shape[3::2], strict=True)]
        return x.reshape(*x.shape[:2], *axes)[tuple(inside)]

    def weight_to_matrix(self, layer: Any, weight: Tensor) -> Tensor:
        kernel_axes = range(2, weight.ndim)
        grouped = weight.flip(*kernel_axes).unflatten(0, (layer.groups, -1))
        return grouped.transpose(1, 2).flatten(0, 1).flatten(1)

    def matrix_to_weight(self, layer: Any, matrix: Tensor) -> Tensor:
        groups, kernel = layer.groups, layer.kernel_size
        grouped = matrix.unflatten(1, (-1, *kernel)).unflatten(0, (groups, -1))
        return grouped.transpose(1, 2).flatten(0, 1).flip(*range(2, 2 + len(kernel)))
