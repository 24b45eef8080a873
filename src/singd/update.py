r"""The mathematics of SINGD, one function per equation, as pure functions of structured matrices.

Symbols as in the paper: :math:`K, C` are the preconditioner factors of one layer, :math:`m_K, m_C` their
Riemannian momenta, :math:`H_K = P(K^\top U K)` and :math:`H_C = P(C^\top G C)` the projected curvature,
and :math:`\operatorname{tr}` the *average* trace. Everything here works for any object with the interface of
:class:`~singd.structures.base.StructuredMatrix`; no argument is changed.

Source: Lin et al., "Structured Inverse-Free Natural Gradient", ICML 2024, arXiv:2312.05705.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from singd.structures import StructuredMatrix


class Outer(Protocol):
    """What the natural gradient asks of a factor: K K^T times something, in which dtype."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the factor."""

    def mm_AAt(self, X: Tensor) -> Tensor:
        """K K^T X for a dense X, [n, m]."""

    def mm_AAt_(self, X: Tensor) -> Tensor:
        """The same, where X may be overwritten: with the result, or with anything else."""


def riemannian_momenta(
    K: StructuredMatrix,
    C: StructuredMatrix,
    m_K: StructuredMatrix,
    m_C: StructuredMatrix,
    H_K: StructuredMatrix,
    H_C: StructuredMatrix,
    *,
    damping: float,
    alpha1: float,
    normalize: bool = False,
    kfac_like: bool = False,
    weight: Tensor | float = 1.0,
) -> tuple[StructuredMatrix, StructuredMatrix]:
    r"""The new momenta of both factors, from the *old* factors on both sides.

    .. math::
        m_K \leftarrow \alpha_1 m_K + \tfrac12 \left[\operatorname{tr}(H_C)\, H_K
            + \lambda \operatorname{tr}(C^\top C)\, P(K^\top K) - I\right]

    and :math:`m_C` with the roles exchanged. ``normalize`` scales the bracket by :math:`1 - \alpha_1`.
    ``kfac_like`` (IKFAC) replaces both traces by one and :math:`\alpha_1` by zero. ``weight`` is one, or
    zero to leave the momenta as they are (a number on the device, so that nothing waits for it).
    """
    KK, CC = K.gram(), C.gram()  # P(K^T K), P(C^T C)
    tr_H_K: Tensor | float = 1.0
    tr_H_C: Tensor | float = 1.0
    tr_KK: Tensor | float = 1.0
    tr_CC: Tensor | float = 1.0
    if kfac_like:
        alpha1 = 0.0
    else:
        tr_H_K, tr_H_C = H_K.average_trace(), H_C.average_trace()
        tr_KK, tr_CC = KK.average_trace(), CC.average_trace()
    scale = (0.5 * (1 - alpha1) if normalize else 0.5) * weight
    decay = 1 - weight * (1 - alpha1)

    new_m_K = (m_K * decay).add_(H_K, scale * tr_H_C).add_(KK, scale * damping * tr_CC)
    new_m_C = (m_C * decay).add_(H_C, scale * tr_H_K).add_(CC, scale * damping * tr_KK)
    return new_m_K.add_identity_(-scale), new_m_C.add_identity_(-scale)


def moved_factor(
    K: StructuredMatrix,
    m_K: StructuredMatrix,
    *,
    lr_cov: float,
    normalize: bool = False,
    weight: Tensor | float = 1.0,
) -> StructuredMatrix:
    r"""One step on a factor, :math:`K \leftarrow K - \beta_1 K m_K`.

    ``normalize`` divides the step by :math:`\max(1, \max_{ij} |m_{K,ij}|)`; ``weight`` multiplies it.
    """
    step = lr_cov * weight
    if normalize:
        step = step / m_K.max_abs().clamp(min=1.0)
    return (K @ m_K).mul_(-step).add_(K)


def natural_gradient(K: Outer, C: Outer, dW: Tensor, *, overwrite: bool = False) -> Tensor:
    r"""The natural gradient :math:`N = C C^\top \, dW \, K K^\top` of a layer.

    Args:
        K: The input factor, ``d_i`` x ``d_i``.
        C: The output-gradient factor, ``d_o`` x ``d_o``.
        dW: The gradient as a matrix, ``[d_o, d_i]``, of any dtype.
        overwrite: Whether ``dW`` is not needed any more, so that its memory may be used.

    Returns:
        ``[d_o, d_i]`` in the dtype of ``C``.
    """
    transposed = dW.mT.to(K.dtype)
    right = (K.mm_AAt_(transposed) if overwrite else K.mm_AAt(transposed)).mT  # dW K K^T
    return C.mm_AAt_(right.to(C.dtype))
