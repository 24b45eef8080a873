"""Convolutions."""

from __future__ import annotations

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Size, Tensor

from singd.layers.patch_kind import Conv, PatchKind


class ConvKind(PatchKind):
    """`nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d` with all their options."""

    def padded(self, layer: Conv, x: Tensor, output_shape: Size | None) -> Tensor:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        return F.pad(x, for_torch(padding(layer)), mode=mode)

    def stride(self, layer: Conv) -> tuple[int, ...]:
        return layer.stride


def padding(layer: Conv) -> list[tuple[int, int]]:
    """How much a convolution pads each axis before and after."""
    if layer.padding == "valid":
        return [(0, 0)] * len(layer.kernel_size)
    if layer.padding == "same":
        # An even kernel has one more behind than before.
        totals = [d * (k - 1) for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        return [(t // 2, t - t // 2) for t in totals]
    return [(int(p), int(p)) for p in layer.padding]


def for_torch(pads: Iterable[tuple[int, int]]) -> list[int]:
    """Pads per axis in the order of `F.pad`, which begins at the last axis."""
    return [p for pair in reversed(list(pads)) for p in pair]
