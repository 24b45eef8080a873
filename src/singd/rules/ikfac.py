r"""IKFAC: KFAC without an inverse, to which SINGD adds the coupling of both factors and a momentum.

Each factor follows the inverse of its own damped curvature: :math:`K K^\top = (U + \lambda I)^{-1}` up to
:math:`O(\beta_1^2)` per step, where U is the running average of KFAC.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from singd.rules.base import Curvature, Pair
from singd.rules.singd import Singd, _inverse_root
from singd.structures import StructuredMatrix


def ikfac_momentum(K: StructuredMatrix, H_K: StructuredMatrix, damping: Any) -> StructuredMatrix:
    r""":math:`m_K = \tfrac12 [H_K + \lambda P(K^\top K) - I]`, and so for C."""
    return (H_K * 0.5).add_(K.gram(), 0.5 * damping).add_identity_(-0.5)


class Ikfac(Singd):
    """SINGD without the coupling of K and C, and without Riemannian momentum."""

    name = "ikfac"

    def momenta(self, *factors: StructuredMatrix, damping: Any, options: Mapping[str, Any]) -> Pair:
        K, C, _, _, H_K, H_C = factors
        return ikfac_momentum(K, H_K, damping[0]), ikfac_momentum(C, H_C, damping[1])

    def damping(self, curvature: Curvature, options: Mapping[str, Any]) -> Any:
        """That of each factor: lambda, or with ``relative_damping`` that many times its own average trace."""
        relative = options["relative_damping"]
        traces = (curvature.u, curvature.g) if relative else (1.0, 1.0)
        return tuple(options["damping"] * trace for trace in traces)

    def start_scales(self, curvature: Curvature, damping: Any) -> tuple[Any, Any]:
        """k^2 = 1 / (u + lambda) and c^2 = 1 / (g + lambda)."""
        pairs = zip((curvature.u, curvature.g), damping, strict=True)
        k, c = (_inverse_root(trace + shift, 2) for trace, shift in pairs)
        return k, c
