"""Matrices that are in no known layer: a rule that sees only gradients preconditions them too."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from singd.layers.base import LayerKind


class LooseKind(LayerKind):
    """A parameter with two dimensions, such as the projections of attention and of recurrent layers.

    Args:
        attribute: Its name in its module.
    """

    def __init__(self, attribute: str) -> None:
        self.attribute = attribute

    def inputs(self, layer: nn.Module, x: Tensor) -> Tensor:
        raise NotImplementedError("A loose matrix sees no inputs.")

    def grads(self, layer: nn.Module, g: Tensor) -> Tensor:
        raise NotImplementedError("A loose matrix sees no output gradients.")

    def size(self, layer: nn.Module, bias: bool) -> tuple[int, int]:
        d_o, d_in = getattr(layer, self.attribute).shape
        return d_o, d_in

    def matrix_to_weight(self, layer: Any, matrix: Tensor) -> Tensor:
        return matrix
