"""Transposed convolutions."""

from __future__ import annotations

from typing import TypeAlias

import torch.nn.functional as F
from torch import Size, Tensor, nn

from singd.layers.conv import PatchKind, for_torch, receptive_extent

ConvTranspose: TypeAlias = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


class ConvTransposeKind(PatchKind):
    """`nn.ConvTranspose1d`, `nn.ConvTranspose2d` and `nn.ConvTranspose3d`.

    A transposed convolution is a convolution of stride 1 with the mirrored kernel, over the input
    with stride - 1 zeros between its entries (Dumoulin and Visin, "A guide to convolution
    arithmetic for deep learning", arXiv 1603.07285, section 4). Its matrix therefore is that
    convolution's: a row per output channel, columns C_in/groups * kernel with the kernel mirrored.
    """

    def stride(self, layer: ConvTranspose) -> tuple[int, ...]:
        return (1,) * len(layer.kernel_size)

    def spaced(self, layer: ConvTranspose, sizes: Size) -> Size:
        return Size((n - 1) * s + 1 for n, s in zip(sizes, layer.stride, strict=True))

    def padding(
        self, layer: ConvTranspose, sizes: Size, output: Size | None
    ) -> list[tuple[int, int]]:
        pads = []
        for i, (n, extent) in enumerate(zip(sizes, receptive_extent(layer), strict=True)):
            cut = int(layer.padding[i])
            out = n + extent - 2 * cut + layer.output_padding[i] if output is None else output[i]
            before = extent - cut
            pads.append((before, out + extent - before - n))
        return pads

    def padded(self, layer: ConvTranspose, x: Tensor, padding: list[tuple[int, int]]) -> Tensor:
        zero_inserted = x.new_zeros(*x.shape[:2], *self.spaced(layer, x.shape[2:]))
        every = [slice(None), slice(None), *(slice(None, None, s) for s in layer.stride)]
        zero_inserted[tuple(every)] = x
        return F.pad(zero_inserted, for_torch(padding))

    def weight_to_matrix(self, layer: ConvTranspose, weight: Tensor) -> Tensor:
        kernel_axes = range(2, weight.ndim)
        grouped = weight.flip(*kernel_axes).unflatten(0, (layer.groups, -1))
        return grouped.transpose(1, 2).flatten(0, 1).flatten(1)

    def matrix_to_weight(self, layer: ConvTranspose, matrix: Tensor) -> Tensor:
        groups, kernel = layer.groups, layer.kernel_size
        grouped = matrix.unflatten(1, (-1, *kernel)).unflatten(0, (groups, -1))
        return grouped.transpose(1, 2).flatten(0, 1).flip(*range(2, 2 + len(kernel)))
