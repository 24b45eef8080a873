r"""KFAC, the textbook: running averages of U and G, and their damped inverses.

Sources: Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", ICML 2015,
arXiv:1503.05671 (section 6.3 on pi); Grosse and Martens, arXiv:1602.01407, for convolutions.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from singd.rows import Rows
from singd.rules.base import INPUT, OUTPUT, Curvature, Factors, Pair, Rule, averaging
from singd.structures import BlockDiagonal, Dense, Diagonal, StructuredMatrix


class Kfac(Rule):
    r"""KFAC with factored damping.

    .. math::
        U \leftarrow (1 - \beta) U + \beta U_t, \qquad G \leftarrow (1 - \beta) G + \beta G_t, \qquad
        N = (G + \tfrac{\sqrt\lambda}{\pi} I)^{-1}\, dW\, (U + \pi \sqrt\lambda\, I)^{-1}

    with :math:`\beta` = ``lr_cov``; the first statistics count in full. ``relative_damping`` multiplies
    :math:`\lambda` by the average traces of both.

    Args:
        pi: Whether :math:`\pi = \sqrt{\operatorname{tr} U / \operatorname{tr} G}` (average traces), which
            makes the step invariant to U -> c U, G -> G / c; else :math:`\pi = 1`.
        inverse_dtype: Where the damped factors are inverted, by Cholesky: float32 whatever the factors' dtype is.
            A half precision is for teaching: the damped factor is rounded to it first, and has negative
            eigenvalues where the damping is below the rounding; an LU factorisation inverts it all the same.
    """

    name = "kfac"
    keeps = {"U": INPUT, "G": OUTPUT, "U_inv": INPUT, "G_inv": OUTPUT}

    def __init__(self, pi: bool = True, inverse_dtype: torch.dtype = torch.float32):
        if not (isinstance(inverse_dtype, torch.dtype) and inverse_dtype.is_floating_point):
            raise TypeError(
                f"inverse_dtype must be a floating-point torch.dtype, got {inverse_dtype!r}."
            )
        self.pi, self.inverse_dtype = bool(pi), inverse_dtype

    def refusal(self, structure: StructuredMatrix) -> str | None:
        works = isinstance(structure, Dense | Diagonal | BlockDiagonal)
        return None if works else "dense, diagonal and block-diagonal structures"

    def start(self, identity: Mapping[str, StructuredMatrix]) -> Factors:
        """U = G = 0, and identities as inverses."""
        scale = {"U": 0.0, "G": 0.0, "U_inv": 1.0, "G_inv": 1.0}
        return {name: identity[side] * scale[name] for name, side in self.keeps.items()}

    def curvature(self, factors: Factors, a: Rows, g: Rows) -> Pair:
        """P(A^T A) and P(B^T B) for the rows A and B."""
        return factors[INPUT].project_congruence(a), factors[OUTPUT].project_congruence(g)

    def update(
        self, factors: Factors, curvature: Curvature, options: Mapping[str, Any], updates: int
    ) -> Factors:
        beta = 1.0 if updates == 0 else averaging(options, options["lr_cov"], updates)
        U = (factors["U"] * (1 - beta)).add_(curvature.H_K, beta)
        G = (factors["G"] * (1 - beta)).add_(curvature.H_C, beta)
        u, g = U.average_trace(), G.average_trace()
        some, one = u * g > 0, torch.ones_like(u)
        pi = torch.where(some, u / g, one).sqrt() if self.pi else one
        root = (options["damping"] * (u * g if options["relative_damping"] else one)).sqrt()
        U_inv, G_inv = self.damped_inverse(U, pi * root), self.damped_inverse(G, root / pi)
        if options["relative_damping"]:  # no curvature, no damping: the inverses stay
            choose: Any = partial(torch.where, some)
            U_inv, G_inv = U_inv.map(choose, factors["U_inv"]), G_inv.map(choose, factors["G_inv"])
        return {"U": U, "G": G, "U_inv": U_inv, "G_inv": G_inv}

    def damped_inverse(self, A: StructuredMatrix, shift: Tensor) -> StructuredMatrix:
        """(A + shift I)^-1, block by block where A consists of blocks, in A's dtype."""
        half = self.inverse_dtype.itemsize < 4
        dtype = torch.float32 if half else torch.promote_types(A.dtype, self.inverse_dtype)
        damped = A.to(dtype=dtype).map(torch.clone).add_identity_(shift)
        if half:
            rounded = damped.to(dtype=self.inverse_dtype).to(dtype=dtype)
            inverse = rounded.map(lambda t: 1 / t if t.ndim == 1 else torch.linalg.inv_ex(t)[0])
            return inverse.to(dtype=self.inverse_dtype).to(dtype=A.dtype)
        return damped.map(_inverse).to(dtype=A.dtype)

    def sides(self, factors: Factors) -> Pair:
        return factors["U_inv"], factors["G_inv"]

    def prepare(self, factors: Factors, keep: bool) -> Any:
        return self.sides(factors)  # the inverses are symmetric, and multiply once

    def direction(self, prepared: Any, dW: Tensor, *, overwrite: bool = False) -> Tensor:
        U_inv, G_inv = prepared
        right = U_inv.mm(dW.mT.to(U_inv.dtype)).mT
        return G_inv.mm(right.to(G_inv.dtype))


def _inverse(t: Tensor) -> Tensor:
    """Of a diagonal [n], or of positive definite matrices [..., n, n]; nan of others, without waiting."""
    if t.ndim == 1:
        return 1 / t
    # what is left of a matrix that is not positive definite would pass for a factor
    L, failed = torch.linalg.cholesky_ex(t)
    return torch.cholesky_inverse(L.masked_fill(failed[..., None, None] > 0, torch.nan))
