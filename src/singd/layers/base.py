"""The interface of a layer kind: inputs and output gradients as rows, parameters as one matrix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Size, Tensor

from singd.rows import DenseRows, Rows, WithOnes

Approx = Literal["expand", "reduce"]


class LayerKind(ABC):
    """How one class of layers becomes y = W a + b over shared positions.

    A kind holds no state; one object serves all layers of its class. It has to say where the
    positions are (`inputs`, `grads`) and, unless flattening each output unit's weights will do, how
    the weight becomes a matrix (`weight_to_matrix`, `matrix_to_weight`). The rest follows. The law
    of all kinds, with rows a_r of the inputs and g_r of the output gradients (expand, no groups):

        to_matrix(layer, weight.grad, bias.grad) = sum over r of g_r a_r^T
    """

    input_structure: str | None = None
    """The name of the only structure that the input factor K may have, if there is only one."""

    takes_sequences: bool = False
    """Whether inputs may be sequences, whose second dimension may be the batch (``batch_first=False``)."""

    input_name: str = "input"
    """The name of the first argument of the layer's `forward`."""

    @abstractmethod
    def inputs(self, layer: Any, x: Tensor) -> Tensor:
        """The inputs x of a forward as [B, S, d_in]: batch, shared positions, features."""

    @abstractmethod
    def grads(self, layer: Any, g: Tensor) -> Tensor:
        """The gradient g of the output as [B, S, d_o]: batch, shared positions, output units."""

    def weight_to_matrix(self, layer: Any, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as a matrix [d_o, d_in]."""
        return weight.flatten(1)

    def matrix_to_weight(self, layer: Any, matrix: Tensor) -> Tensor:
        """The inverse of `weight_to_matrix`."""
        return matrix.reshape(layer.weight.shape)

    def supports(self, layer: Any) -> str | None:
        """None if the layer can be preconditioned, else the reason why not, in a few words."""
        if layer.weight.is_complex():
            return "complex weight"
        return None if layer.weight.numel() else "a weight without numbers"

    def size(self, layer: Any, bias: bool) -> tuple[int, int]:
        """The size (d_o, d_i) of the layer's matrix; d_i counts the bias column if `bias`."""
        shape_only = torch.empty(layer.weight.shape, device="meta")
        d_o, d_in = self.weight_to_matrix(layer, shape_only).shape
        return d_o, d_in + bias

    def input(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """The layer's input among the arguments of a forward call.

        Raises:
            TypeError: The call has no such argument.
        """
        if args:
            return args[0]
        if self.input_name in kwargs:
            return kwargs[self.input_name]
        raise TypeError(
            f"A forward call without the argument {self.input_name!r}; it has {sorted(kwargs)}."
        )

    def positions(self, layer: Any, x: Tensor, g: Tensor) -> tuple[int, int]:
        """The batch size B and the number S of shared positions of one forward."""
        batch, shared = self.grads(layer, g).shape[:2]
        return batch, shared

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
        """The rows of inputs a, not scaled by any count.

        Args:
            layer: A layer of this kind.
            x: Its input in one forward.
            approx: "expand" for B * S rows; "reduce" for B rows, the means over the positions.
            bias: Whether to append the column of ones.
            dtype: The rows' dtype.
            output_shape: The shape of the output of that forward, where the caller knows it. Only a
                transposed convolution called with `output_size` cannot do without.

        Returns:
            Rows [m, d_i].
        """
        rows = self.bare_rows(layer, x, approx, dtype, output_shape)
        return WithOnes(rows) if bias else rows

    def bare_rows(
        self, layer: Any, x: Tensor, approx: Approx, dtype: torch.dtype, output_shape: Size | None
    ) -> Rows:
        """The rows of inputs without the column of ones; see `input_rows`."""
        a = self.inputs(layer, x)
        # The mean over no positions is not a number: such a forward has no rows.
        mean = approx == "reduce" and a.shape[1] > 0
        return DenseRows(a.mean(1, dtype=dtype) if mean else a.to(dtype))

    def grad_rows(
        self, layer: Any, g: Tensor, x: Tensor, *, approx: Approx, dtype: torch.dtype
    ) -> Rows:
        """The rows of output gradients g, not scaled by any count.

        Args:
            layer: A layer of this kind.
            g: The gradient of its output in one backward.
            x: Its input in the same forward.
            approx: "expand" for B * S rows; "reduce" for B rows, the sums over the positions.
            dtype: The rows' dtype.

        Returns:
            Rows [m, d_o].
        """
        g = self.grads(layer, g)
        return DenseRows(g.to(dtype) if approx == "expand" else g.sum(1, dtype=dtype))

    def to_matrix(self, layer: Any, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Tensors of the parameters' shapes as a matrix [d_o, d_i], the bias its last column."""
        matrix = self.weight_to_matrix(layer, weight)
        return matrix if bias is None else torch.cat([matrix, bias[:, None]], dim=1)

    def from_matrix(self, layer: Any, matrix: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
        """The inverse of `to_matrix`.

        Args:
            layer: A layer of this kind.
            matrix: [d_o, d_i].
            bias: Whether the last column is the bias.

        Returns:
            Tensors of the shapes of the weight and of the bias (None without it).
        """
        if not bias:
            return self.matrix_to_weight(layer, matrix), None
        return self.matrix_to_weight(layer, matrix[:, :-1]), matrix[:, -1]
