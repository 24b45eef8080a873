"""Structured inverse-free natural gradient descent for PyTorch."""

from singd import rules
from singd.fisher import sample_labels
from singd.groups import PUBLISHED, Growing
from singd.layers import LayerKind, register_layer
from singd.optimizer import SINGD, Factors
from singd.report.suggest import Suggestion, suggest
from singd.rules import Rule, register_rule
from singd.structures import StructuredMatrix, register_structure, registered_structures, structure

__version__ = "0.1.0"

__all__ = [
    "PUBLISHED",
    "SINGD",
    "Factors",
    "Growing",
    "LayerKind",
    "Rule",
    "StructuredMatrix",
    "Suggestion",
    "register_layer",
    "register_rule",
    "register_structure",
    "registered_structures",
    "rules",
    "sample_labels",
    "structure",
    "suggest",
]
