"""Layers give rows: all that SINGD needs to know about each class of layers."""

from singd.layers.base import LayerKind
from singd.layers.conv import ConvKind
from singd.layers.conv_transpose import ConvTransposeKind
from singd.layers.embedding import EmbeddingKind
from singd.layers.linear import LinearKind
from singd.layers.registry import KINDS, find_kind, register_layer
from singd.rows import DenseRows, Rows, WithOnes

__all__ = [
    "KINDS",
    "ConvKind",
    "ConvTransposeKind",
    "DenseRows",
    "EmbeddingKind",
    "LayerKind",
    "LinearKind",
    "Rows",
    "WithOnes",
    "find_kind",
    "register_layer",
]
