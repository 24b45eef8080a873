"""Rules move the factors: SINGD and its relatives, one file each, behind one seam."""

from singd.rules.base import INPUT, OUTPUT, Curvature, Factors, Rule, natural_gradient
from singd.rules.ikfac import Ikfac
from singd.rules.kfac import Kfac
from singd.rules.registry import find_rule, register_rule, registered_rules
from singd.rules.shampoo import Shampoo
from singd.rules.singd import Singd

__all__ = [
    "INPUT",
    "OUTPUT",
    "Curvature",
    "Factors",
    "Ikfac",
    "Kfac",
    "Rule",
    "Shampoo",
    "Singd",
    "find_rule",
    "natural_gradient",
    "register_rule",
    "registered_rules",
]
