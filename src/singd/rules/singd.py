r"""The rule of SINGD, one function per equation of the paper.

:math:`K, C` are the factors of one layer, :math:`m_K, m_C` their Riemannian momenta,
:math:`H_K = P(K^\top U K)` and :math:`H_C = P(C^\top G C)` the projected curvature, and
:math:`\operatorname{tr}` the *average* trace.

Source: Lin et al., "Structured Inverse-Free Natural Gradient", ICML 2024, arXiv:2312.05705. With dense
factors it is INGD: Lin et al., "Simplifying Momentum-based Riemannian Submanifold Optimization", ICML 2023,
arXiv:2302.09738.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from singd.rows import Rows
from singd.rules.base import INPUT, OUTPUT, Curvature, Factors, Pair, Rule, averaging
from singd.structures import StructuredMatrix


def riemannian_momenta(
    K: StructuredMatrix,
    C: StructuredMatrix,
    m_K: StructuredMatrix,
    m_C: StructuredMatrix,
    H_K: StructuredMatrix,
    H_C: StructuredMatrix,
    *,
    damping: float | Tensor,
    alpha1: float,
    normalize: bool = False,
    tr_H: tuple[Any, Any] | None = None,
) -> Pair:
    r"""The new momenta of both factors, from the *old* factors on both sides.

    .. math::
        m_K \leftarrow \alpha_1 m_K + \tfrac12 \left[\operatorname{tr}(H_C)\, H_K
            + \lambda \operatorname{tr}(C^\top C)\, P(K^\top K) - I\right]

    and :math:`m_C` with the roles exchanged. ``normalize`` scales the bracket by :math:`1 - \alpha_1`.
    ``tr_H`` are other numbers in the place of the average traces of both H.
    """
    KK, CC = K.gram(), C.gram()  # P(K^T K), P(C^T C)
    tr_H_K, tr_H_C = tr_H or (H_K.trace() / H_K.n, H_C.trace() / H_C.n)
    tr_KK, tr_CC = KK.trace() / KK.n, CC.trace() / CC.n
    half = 0.5 * (1 - alpha1) if normalize else 0.5

    new_m_K = (m_K * alpha1).add_(H_K, half * tr_H_C).add_(KK, half * damping * tr_CC)
    new_m_C = (m_C * alpha1).add_(H_C, half * tr_H_K).add_(CC, half * damping * tr_KK)
    return new_m_K.add_identity_(-half), new_m_C.add_identity_(-half)


def step_size(
    m_K: StructuredMatrix, beta_1: float, normalize: bool | str = False
) -> float | Tensor:
    r"""The step on a factor: :math:`\beta_1`, or less where the momentum is large.

    Args:
        m_K: The momentum.
        beta_1: The step, ``lr_cov``.
        normalize: True divides by :math:`\max(1, \max_{ij} |m_{K,ij}|)`, as published, which bounds nothing.
            ``"spectral"`` bounds :math:`\beta_1 \lVert m_K \rVert_2` by 1/2, so that K never loses its inverse.
    """
    if normalize == "spectral":
        return (0.5 / m_K.spectral_norm().clamp(min=1e-30)).clamp(max=beta_1)
    return beta_1 / m_K.max_abs().clamp(min=1.0) if normalize else beta_1


def moved_factor(
    K: StructuredMatrix, m_K: StructuredMatrix, beta_1: float | Tensor
) -> StructuredMatrix:
    r"""One step on a factor, :math:`K \leftarrow K - \beta_1 K m_K`."""
    return (K @ m_K).mul_(-beta_1).add_(K)


class Singd(Rule):
    """Structured inverse-free natural gradient descent; with dense factors, INGD."""

    name = "singd"
    keeps = {"K": INPUT, "C": OUTPUT, "m_K": INPUT, "m_C": OUTPUT}
    gathers_with: tuple[str, ...] = ("K", "C")
    tr_H: tuple[Any, Any] | None = None
    """Numbers in the place of the average traces of H_K and H_C."""

    def kept(self, options: Mapping[str, Any]) -> Mapping[str, str]:
        """Without momentum, the momenta need not be kept."""
        return self.keeps if options["alpha1"] else {"K": INPUT, "C": OUTPUT}

    def curvature(self, factors: Factors, a: Rows, g: Rows) -> Pair:
        """P(K^T A^T A K) and P(C^T B^T B C) for the rows A and B."""
        return factors["K"].project_congruence(a), factors["C"].project_congruence(g)

    def update(
        self, factors: Factors, curvature: Curvature, options: Mapping[str, Any], updates: int
    ) -> Factors:
        K, C = factors["K"], factors["C"]
        m_K, m_C = factors.get("m_K") or K * 0.0, factors.get("m_C") or C * 0.0
        H_K, H_C = curvature.H_K, curvature.H_C
        damping = self.damping(curvature, options)
        if options["scaled_start"] and updates == 0:
            k, c = self.start_scales(curvature, damping)
            K, C = K * k, C * c
            H_K, H_C = self.scaled_curvature(H_K, H_C, k, c)
        m_K, m_C = self.momenta(K, C, m_K, m_C, H_K, H_C, damping=damping, options=options)
        beta = averaging(options, options["lr_cov"], updates)
        normalize = options["normalize_lr_cov"]
        K = moved_factor(K, m_K, step_size(m_K, beta, normalize))
        C = moved_factor(C, m_C, step_size(m_C, beta, normalize))
        new = {"K": K, "C": C, "m_K": m_K, "m_C": m_C}
        return {name: new[name] for name in self.kept(options)}

    def momenta(self, *factors: StructuredMatrix, damping: Any, options: Mapping[str, Any]) -> Pair:
        """The new momenta from K, C, m_K, m_C, H_K, H_C."""
        normalize, alpha1 = bool(options["normalize_lr_cov"]), options["alpha1"]
        return riemannian_momenta(
            *factors, damping=damping, alpha1=alpha1, normalize=normalize, tr_H=self.tr_H
        )

    def damping(self, curvature: Curvature, options: Mapping[str, Any]) -> Any:
        r"""lambda, or with ``relative_damping`` that many times the average curvature u g of the layer."""
        relative = options["relative_damping"]
        return options["damping"] * (curvature.u * curvature.g if relative else 1.0)

    def start_scales(self, curvature: Curvature, damping: Any) -> tuple[Any, Any]:
        r"""The scales of K = k I, C = c I at the fixed point: (k c)^2 = 1 / (u g + lambda), with k = c."""
        scale = _inverse_root(curvature.u * curvature.g + damping, 4)
        return scale, scale

    def scaled_curvature(
        self, H_K: StructuredMatrix, H_C: StructuredMatrix, k: Any, c: Any
    ) -> Pair:
        """What was gathered with K and C as if it were with k K and c C."""
        return H_K * (k * k), H_C * (c * c)

    def sides(self, factors: Factors) -> Pair:
        return factors["K"], factors["C"]


def _inverse_root(x: Any, root: int) -> Any:
    """x^(-1/root) of a 0-d tensor, and one where x is zero (a first gradient of zeros says nothing)."""
    return torch.where(x > 0, x.clamp(min=torch.finfo(x.dtype).tiny) ** (-1 / root), 1.0)
