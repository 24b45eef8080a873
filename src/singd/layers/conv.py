"""Convolutions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Size, Tensor

from singd.layers.patch_kind import Conv, PatchKind, for_torch


class ConvKind(PatchKind):
    """`nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d` with all their options."""

    def spread(self, layer: Conv, sizes: Size) -> Size:
        return sizes

    def padding(self, layer: Conv, sizes: Size, output: Size | None) -> list[tuple[int, int]]:
        if layer.padding == "valid":
            return [(0, 0)] * len(layer.kernel_size)
        if layer.padding == "same":
            # An even kernel has one more behind than before.
            reach = [d * (k - 1) for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
            return [(r // 2, r - r // 2) for r in reach]
        return [(int(p), int(p)) for p in layer.padding]

    def padded(self, layer: Conv, x: Tensor, padding: list[tuple[int, int]]) -> Tensor:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        return F.pad(x, for_torch(padding), mode=mode)

    def stride(self, layer: Conv) -> tuple[int, ...]:
        return layer.stride
