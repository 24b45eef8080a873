r"""K^T Z, symmetric, whose last product waits for what will be added to it.

The momentum of a dense factor takes up :math:`a K^\top S K + b K^\top K = K^\top (a S K + b K)`, which is one
product with K^T instead of two. The numbers a and b hold traces, which are known before it:
:math:`\operatorname{tr}(K^\top Z) = \sum_{ij} K_{ij} Z_{ij}`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from singd.products import symmetric

if TYPE_CHECKING:
    from singd.structures.dense import Dense


@dataclass(eq=False)
class Congruence:
    """K^T Z.

    Attributes:
        K: A dense factor, n x n.
        Z: S K with a symmetric S, or a sum of such products with the same K; [n, n].
    """

    K: Dense
    Z: Tensor

    def formed(self) -> Dense:
        """The product."""
        return self.K.with_tensors([symmetric(self.K.a.T, self.Z)])

    def add_to(self, m: Any, a: float | Tensor, gram: Any, b: float | Tensor) -> Any:
        """Add a K^T Z + b K^T K to m in place, by one product."""
        return m.add_((self * a).add_(gram, b).formed())

    def trace(self) -> Tensor:
        """The sum of the diagonal, 0-d, in float32 at least."""
        dtype = torch.promote_types(self.Z.dtype, torch.float32)
        return (self.K.a.to(dtype) * self.Z.to(dtype)).sum()

    def average_trace(self) -> Tensor:
        """The trace over n, 0-d."""
        return self.trace() / self.K.n

    def __mul__(self, scalar: float | Tensor) -> Congruence:
        return Congruence(self.K, self.Z * scalar)

    def mul_(self, scalar: float | Tensor) -> Congruence:
        """Scale in place."""
        self.Z.mul_(scalar)
        return self

    def add_(self, other: Congruence, alpha: float | Tensor = 1.0) -> Congruence:
        """Add ``alpha`` times another one of the same K in place."""
        if isinstance(alpha, Tensor):  # torch's own alpha would wait for the device
            self.Z.addcmul_(other.Z, alpha)
        else:
            self.Z.add_(other.Z, alpha=alpha)
        return self

    def tensors(self) -> list[Tensor]:
        """What is scaled or cleared in place."""
        return [self.Z]

    def flat(self) -> Tensor:
        """The numbers of the product as one vector."""
        return self.formed().flat()
