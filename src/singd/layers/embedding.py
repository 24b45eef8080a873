"""Embeddings."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn

from singd.layers.base import Approx, LayerKind
from singd.precision import wide_dtype
from singd.rows import DenseRows, Rows

SPARSE = "sparse gradients"
"""Why an embedding with ``sparse=True`` is not preconditioned."""


class OneHotRows(Rows):
    """One row per token: the unit vector of its index, or zero for `skip`.

    A^T A is the diagonal matrix of token counts, for which no m x V numbers are needed.

    Args:
        tokens: Integers [m] in [0, vocabulary).
        vocabulary: V, the width.
        dtype: The dtype of all answers.
        skip: The index whose rows are zero, or None.
    """

    def __init__(
        self, tokens: Tensor, vocabulary: int, dtype: torch.dtype, skip: int | None = None
    ) -> None:
        self._tokens, self._dtype, self._skip = tokens, dtype, skip
        self.count, self.width = len(tokens), vocabulary

    def squares(self) -> Tensor:
        # Not bincount, which is not deterministic on every device; counted in float32 at least,
        # because adding ones stops at 256 in bfloat16.
        ones = torch.ones_like(self._tokens, dtype=wide_dtype(self._dtype))
        counts = ones.new_zeros(self.width).index_add_(0, self._tokens, ones)
        return self._without_skip(counts).to(self._dtype)

    def sums(self) -> Tensor:
        return self.squares()

    def matrix(self) -> Tensor:
        return self._without_skip(F.one_hot(self._tokens, self.width).to(self._dtype))

    def mm(self, Y: Tensor) -> Tensor:
        rows = Y[self._tokens]
        skipped = self._tokens == (-1 if self._skip is None else self._skip)
        return rows.masked_fill(skipped[:, None], 0)

    def _without_skip(self, t: Tensor) -> Tensor:
        """Zero the skipped column of t [..., V], in place."""
        if self._skip is not None:
            t[..., self._skip] = 0
        return t


class EmbeddingKind(LayerKind):
    """`nn.Embedding`: a linear layer on one-hot rows, its matrix the transposed weight [D, V].

    Different positions of a sequence pick different rows of the weight, which do not interact: a
    mean of one-hot rows would couple tokens that only happen to be neighbours. "reduce" therefore
    has no meaning here: every token is a row of its own on both sides, as with "expand".
    Tokens at `padding_idx` have no gradient: their rows are zero on both sides, but counted.
    `max_norm` changes the weight in the forward, which is no business of the statistics.
    """

    input_structure = "diagonal"
    takes_sequences = True

    def supports(self, layer: nn.Embedding) -> str | None:
        if layer.sparse:
            return SPARSE
        if layer.scale_grad_by_freq:
            return "scale_grad_by_freq=True"
        return super().supports(layer)

    def inputs(self, layer: nn.Embedding, x: Tensor) -> Tensor:
        rows = self.bare_rows(layer, x, "expand", layer.weight.dtype, None)
        return rows.matrix().unflatten(0, self._batch_and_shared(x))

    def grads(self, layer: nn.Embedding, g: Tensor) -> Tensor:
        return g.reshape(*self._batch_and_shared(g[..., 0]), g.shape[-1])

    def weight_to_matrix(self, layer: nn.Embedding, weight: Tensor) -> Tensor:
        return weight.T

    def matrix_to_weight(self, layer: nn.Embedding, matrix: Tensor) -> Tensor:
        return matrix.T

    def bare_rows(
        self, layer: Any, x: Tensor, approx: Approx, dtype: torch.dtype, output_shape: Size | None
    ) -> Rows:
        return OneHotRows(x.flatten(), layer.num_embeddings, dtype, layer.padding_idx)

    def grad_rows(
        self, layer: nn.Embedding, g: Tensor, x: Tensor, *, approx: Approx, dtype: torch.dtype
    ) -> Rows:
        g = g.to(dtype)
        if layer.padding_idx is not None:
            g = g.masked_fill((x == layer.padding_idx).unsqueeze(-1), 0)
        return DenseRows(g.reshape(x.numel(), g.shape[-1]))

    @staticmethod
    def _batch_and_shared(tokens: Tensor) -> tuple[int, int]:
        """The token tensor's shape as (B, S); a lone token is a batch of one."""
        return (tokens.shape[0], tokens.shape[1:].numel()) if tokens.ndim else (1, 1)
