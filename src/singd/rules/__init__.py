"""Rules move the factors: SINGD and its relatives, one file each, behind one seam; and the names of rules."""

from __future__ import annotations

from typing import Any

from singd.rules.base import INPUT, OUTPUT, Curvature, Factors, Rule, natural_gradient
from singd.rules.ikfac import Ikfac
from singd.rules.kfac import Kfac
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

_REGISTRY: dict[str, Rule] = {rule.name: rule for rule in (Singd(), Ikfac(), Kfac(), Shampoo())}


def find_rule(spec: Any) -> Rule:
    """The rule that is meant by a name or an object.

    Raises:
        TypeError: If it is neither.
        ValueError: If the name is unknown; the sentence lists the choices.
    """
    if isinstance(spec, Rule):
        return spec
    if not isinstance(spec, str):
        raise TypeError(f"rule must be a name or an object of a Rule class, got {spec!r}.")
    if spec not in _REGISTRY:
        choices = ", ".join(map(repr, _REGISTRY))
        raise ValueError(f"Unknown rule {spec!r}; choose from {choices}.")
    return _REGISTRY[spec]


def register_rule(name: str, rule: Rule) -> None:
    """Give a rule a name, usable as ``rule=name``.

    Args:
        name: A new name.
        rule: An object of a subclass of :class:`~singd.rules.base.Rule`.

    Raises:
        TypeError: If it is something else.
        ValueError: If the name is taken by another rule.
    """
    if not isinstance(rule, Rule):
        raise TypeError(f"rule must be an object of a Rule class, got {rule!r}.")
    if _REGISTRY.get(name, rule) is not rule:
        raise ValueError(f"The rule name {name!r} is taken; choose another one.")
    _REGISTRY[name] = rule


def registered_rules() -> dict[str, Rule]:
    """All rules by their names."""
    return dict(_REGISTRY)
