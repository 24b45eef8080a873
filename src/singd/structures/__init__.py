"""Structured matrices: sets of square matrices closed under addition, scaling and multiplication."""

from singd.structures.base import Preconditioner, StructuredMatrix, Transposed, static
from singd.structures.block_diagonal import BlockDiagonal
from singd.structures.bordered import Bordered, from_recursive_layout
from singd.structures.dense import Dense
from singd.structures.diagonal import Diagonal
from singd.structures.registry import (
    StructureSpec,
    register_structure,
    registered_structures,
    structure,
)
from singd.structures.toeplitz import UpperToeplitz

__all__ = [
    "BlockDiagonal",
    "Bordered",
    "Dense",
    "Diagonal",
    "Preconditioner",
    "StructureSpec",
    "StructuredMatrix",
    "Transposed",
    "UpperToeplitz",
    "from_recursive_layout",
    "register_structure",
    "registered_structures",
    "static",
    "structure",
]
