"""Structured inverse-free natural gradient descent for PyTorch."""

from singd.layers import LayerKind, register_layer
from singd.optimizer import SINGD, Factors
from singd.structures import StructuredMatrix, register_structure, registered_structures, structure

__version__ = "0.1.0"

__all__ = [
    "SINGD",
    "Factors",
    "LayerKind",
    "StructuredMatrix",
    "register_layer",
    "register_structure",
    "registered_structures",
    "structure",
]
