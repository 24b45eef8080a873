"""Structured matrices: sets of square matrices closed under addition, scaling and multiplication."""

from singd.structures.base import Curvature, OuterProduct, StructuredMatrix, Transposed
from singd.structures.block_diagonal import BlockDiagonal
from singd.structures.congruence import Congruence
from singd.structures.dense import Dense
from singd.structures.diagonal import Diagonal
from singd.structures.registry import (
    Structure,
    register_structure,
    registered_structures,
    structure,
)
from singd.structures.toeplitz import UpperToeplitz
from singd.structures.triangular import Upper

Preconditioner = OuterProduct
__all__ = [
    "BlockDiagonal",
    "Congruence",
    "Curvature",
    "Dense",
    "Diagonal",
    "OuterProduct",
    "Structure",
    "StructuredMatrix",
    "Transposed",
    "Upper",
    "UpperToeplitz",
    "register_structure",
    "registered_structures",
    "structure",
]
