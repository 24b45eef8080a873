r"""SINGD's step with the curvature of the gradient itself: inverse- and root-free Shampoo.

With :math:`U = dW^\top C C^\top dW / d_o` in the place of :math:`\operatorname{tr}(C^\top G C) U`, and its
mirror image. No layer is hooked, so that any matrix can be preconditioned, and gradients that are averaged
over micro-batches and processes give statistics that are averaged already.

Source: Lin et al., "Structured Inverse-Free Natural Gradient", ICML 2024, appendix on Shampoo; Gupta et al.,
"Shampoo: Preconditioned stochastic tensor optimization", ICML 2018, arXiv:1802.09568, for the statistics.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from singd.precision import wide_dtype
from singd.rows import DenseRows
from singd.rules.base import Curvature, Factors, Pair
from singd.rules.singd import Singd
from singd.structures import StructuredMatrix


class Shampoo(Singd):
    r"""SINGD on the gradient's own second moments, without rows.

    H_K holds the other factor's trace already, and so does H_C:

    .. math::
        m_K \leftarrow \alpha_1 m_K
            + \tfrac12 [H_K + \lambda \operatorname{tr}(C^\top C) P(K^\top K) - I]
    """

    name = "shampoo"
    needs_rows = False
    gathers_with: tuple[str, ...] = ()
    tr_H = (1.0, 1.0)

    def gradient_curvature(self, factors: Factors, dW: Tensor) -> Curvature:
        """P(K^T dW^T C C^T dW K) / d_o and P(C^T dW K K^T dW^T C) / d_i; u g is the mean square of dW."""
        K, C = factors["K"], factors["C"]
        d_o, d_i = dW.shape
        left = C.tmm(dW.to(C.dtype)).to(K.dtype)  # C^T dW, d_o rows for K
        right = K.tmm(dW.mT.to(K.dtype)).to(C.dtype)  # K^T dW^T, d_i rows for C
        H_K = K.project_congruence(DenseRows(left)).mul_(1 / d_o)
        H_C = C.project_congruence(DenseRows(right)).mul_(1 / d_i)
        return Curvature(H_K, H_C, dW.to(wide_dtype(dW.dtype)).square().mean(), 1.0)

    def scaled_curvature(
        self, H_K: StructuredMatrix, H_C: StructuredMatrix, k: Any, c: Any
    ) -> Pair:
        """Each holds both factors, twice."""
        return H_K * (k * k * c * c), H_C * (k * k * c * c)
