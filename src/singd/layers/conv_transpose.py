"""Transposed convolutions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Size, Tensor

from singd.layers.conv import for_torch
from singd.layers.patch_kind import ConvTranspose, PatchKind


class ConvTransposeKind(PatchKind):
    """`nn.ConvTranspose1d`, `nn.ConvTranspose2d` and `nn.ConvTranspose3d`.

    A transposed convolution is a convolution of stride 1 with the mirrored kernel, over the input
    with stride - 1 zeros between its entries (Dumoulin and Visin, "A guide to convolution
    arithmetic for deep learning", arXiv 1603.07285, section 4). Its matrix therefore is that
    convolution's: a row per output channel, columns C_in/groups * kernel with the kernel mirrored.
    """

    def padded(self, layer: ConvTranspose, x: Tensor, output_shape: Size | None) -> Tensor:
        axes = len(layer.kernel_size)
        pads = []
        for i, (k, s, d) in enumerate(
            zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
        ):
            p, extra = int(layer.padding[i]), layer.output_padding[i]
            stuffed, reach = (x.shape[2 + i] - 1) * s + 1, d * (k - 1)
            out = stuffed + reach - 2 * p + extra
            if output_shape is not None:
                out = output_shape[i - axes]
            before = reach - p  # negative where the padding cuts off more than the kernel adds
            pads.append((before, out + reach - before - stuffed))
        return F.pad(zero_stuffed(x, layer.stride), for_torch(pads))

    def stride(self, layer: ConvTranspose) -> tuple[int, ...]:
        return (1,) * len(layer.kernel_size)

    def weight_to_matrix(self, layer: ConvTranspose, weight: Tensor) -> Tensor:
        kernel_axes = range(2, weight.ndim)
        grouped = weight.flip(*kernel_axes).unflatten(0, (layer.groups, -1))
        return grouped.transpose(1, 2).flatten(0, 1).flatten(1)

    def matrix_to_weight(self, layer: ConvTranspose, matrix: Tensor) -> Tensor:
        groups, kernel = layer.groups, layer.kernel_size
        grouped = matrix.unflatten(1, (-1, *kernel)).unflatten(0, (groups, -1))
        return grouped.transpose(1, 2).flatten(0, 1).flip(*range(2, 2 + len(kernel)))


def zero_stuffed(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Put zeros between neighbours: x [B, C, *n] -> [B, C, *((n - 1) * stride + 1)]."""
    if all(s == 1 for s in stride):
        return x
    stuffed = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
    out = x.new_zeros(*x.shape[:2], *stuffed)
    every = [slice(None), slice(None), *(slice(None, None, s) for s in stride)]
    out[tuple(every)] = x
    return out
