"""Linear layers."""

from __future__ import annotations

from torch import Tensor, nn

from singd.layers.base import LayerKind


class LinearKind(LayerKind):
    """`nn.Linear` on [d], [B, d] or [B, ..., d]: all between batch and features are positions."""

    takes_sequences = True

    def inputs(self, layer: nn.Linear, x: Tensor) -> Tensor:
        return _positions_in_the_middle(x)

    def grads(self, layer: nn.Linear, g: Tensor) -> Tensor:
        return _positions_in_the_middle(g)


def _positions_in_the_middle(t: Tensor) -> Tensor:
    """[d], [B, d] or [B, ..., d] -> [B, S, d]."""
    if t.ndim == 1:
        return t[None, None]
    return t.flatten(1, -2) if t.ndim > 2 else t[:, None]
