"""The seam: what a rule is. Layers give rows, structures hold factors, a rule moves them.

A rule is pure mathematics: structured matrices and options in, structured matrices out. Where its factors are
stored, how they come into checkpoints, and what processes exchange follows from what it says that it keeps.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from singd.rows import Rows
from singd.structures import Preconditioner, StructuredMatrix

INPUT, OUTPUT = "input", "output"
"""The sides of a layer's matrix, ``[d_o, d_i]``: its inputs (d_i) and its outputs (d_o)."""

Factors: TypeAlias = Mapping[str, StructuredMatrix]
"""What a rule keeps of one layer, by name."""

Pair: TypeAlias = tuple[StructuredMatrix, StructuredMatrix]
"""A matrix of the input side, and one of the output side."""


@dataclass(eq=False)
class Curvature:
    """What the backward passes since the last step say about one layer, normalised.

    Attributes:
        H_K: What the rule makes of the input rows a: a mean over the rows.
        H_C: What it makes of the output gradients g, with the loss's averaging undone.
        u: The average trace of U = E[a a^T], 0-d; one where no option needs it.
        g: The average trace of G = E[g g^T], 0-d; one where no option needs it.
    """

    H_K: StructuredMatrix
    H_C: StructuredMatrix
    u: Tensor | float = 1.0
    g: Tensor | float = 1.0


class Rule(ABC):
    """How the preconditioner of one layer moves, and what it makes of a gradient.

    A rule holds no state of a layer; one object serves all layers. What it keeps of each of them is a structured
    matrix per name in ``keeps``. Say, for example, ``keeps = {"K": INPUT, "C": OUTPUT}``.
    """

    name: ClassVar[str]
    """What it is called in ``rule=``, in checkpoints and in tables."""

    keeps: Mapping[str, str] = {}
    """The names of what is kept of each layer, each with the side that it belongs to."""

    gathers_with: tuple[str, ...] = ()
    """The kept ones that ``curvature`` reads. All processes need them, also where one of them keeps the layer."""

    needs_rows: ClassVar[bool] = True
    """Whether it looks at inputs and output gradients; else at the gradient alone, and no layer is hooked."""

    @property
    def spelling(self) -> str:
        """Its name in checkpoints, with those arguments of its class that are not as by default.

        An argument is seen if the object keeps it under its own name and it is a plain value.
        """
        usual = {n: p.default for n, p in inspect.signature(type(self)).parameters.items()}
        plain = (bool, int, float, str, torch.dtype)
        own = {n: v for n, v in vars(self).items() if n in usual and isinstance(v, plain)}
        said = ", ".join(f"{n}={v!r}" for n, v in sorted(own.items()) if v != usual[n])
        return f"{self.name}({said})" if said else self.name

    def kept(self, options: Mapping[str, Any]) -> Mapping[str, str]:
        """What of ``keeps`` these options need; what is not kept, ``update`` finds as zero."""
        return self.keeps

    def refusal(self, structure: StructuredMatrix) -> str | None:
        """None if the rule works with factors of this structure, else what it works with, in a few words."""
        return None

    def start(self, identity: Mapping[str, StructuredMatrix]) -> Factors:
        """The factors before the first update; by default I for one-letter names, and zero for all others.

        Args:
            identity: The identity of each side, ``"input"`` and ``"output"``.
        """
        scale = {name: 1.0 if len(name) == 1 else 0.0 for name in self.keeps}
        return {name: identity[side] * scale[name] for name, side in self.keeps.items()}

    def curvature(self, factors: Factors, a: Rows, g: Rows) -> Pair:
        """Raw sums over the rows of one backward pass, which are added over passes and processes.

        Args:
            factors: Those of ``gathers_with`` by their names; where there are none, the identities as ``"input"``
                and ``"output"``.
            a: Rows of inputs, ``[m, d_i]``.
            g: Rows of output gradients, ``[m, d_o]``.
        """
        raise NotImplementedError(f"The rule {self.name!r} sees no rows.")

    def gradient_curvature(self, factors: Factors, dW: Tensor) -> Curvature:
        """The curvature from the gradient ``[d_o, d_i]`` alone, for a rule that sees no rows."""
        raise NotImplementedError(f"The rule {self.name!r} needs rows.")

    @abstractmethod
    def update(
        self, factors: Factors, curvature: Curvature, options: Mapping[str, Any], updates: int
    ) -> Factors:
        """The new factors from the old ones, of which none is changed.

        Args:
            factors: All that is kept.
            curvature: What was seen since the last step.
            options: The parameter group's: ``damping``, ``lr_cov``, ...
            updates: How many updates there were before.
        """

    @abstractmethod
    def sides(self, factors: Factors) -> Pair:
        """The matrices A (input) and B (output) whose products precondition: N = B B^T dW A A^T."""

    def prepare(self, factors: Factors, keep: bool) -> Any:
        """What ``direction`` needs of the factors; ``keep`` says whether it serves many steps."""
        return tuple((keep and A.preconditioner()) or A for A in self.sides(factors))

    def direction(self, prepared: Any, dW: Tensor, *, overwrite: bool = False) -> Tensor:
        """The preconditioned gradient, ``[d_o, d_i]``.

        Args:
            prepared: From ``prepare``.
            dW: The gradient as a matrix, ``[d_o, d_i]``, of any dtype.
            overwrite: Whether ``dW`` is not needed any more, so that its memory may be used.
        """
        K, C = prepared
        return natural_gradient(K, C, dW, overwrite=overwrite)


def natural_gradient(
    K: Preconditioner, C: Preconditioner, dW: Tensor, *, overwrite: bool = False
) -> Tensor:
    r"""The natural gradient :math:`N = C C^\top \, dW \, K K^\top` of a layer.

    Args:
        K: The input factor, ``d_i`` x ``d_i``, or the product K K^T that is kept.
        C: The output factor, ``d_o`` x ``d_o``, or C C^T.
        dW: The gradient as a matrix, ``[d_o, d_i]``, of any dtype.
        overwrite: Whether ``dW`` is not needed any more, so that its memory may be used.

    Returns:
        ``[d_o, d_i]`` in the dtype of ``C``.
    """
    transposed = dW.mT.to(K.dtype)
    right = (K.mm_AAt_(transposed) if overwrite else K.mm_AAt(transposed)).mT  # dW K K^T
    return C.mm_AAt_(right.to(C.dtype))


def averaging(options: Mapping[str, Any], lr_cov: float, updates: int) -> float:
    r"""The step :math:`\beta_t` of a running average: ``lr_cov``, or with ``fast_start`` at least 1 / (t + 1), and
    at most 1/2, so that the first statistics count in full.
    """
    return max(lr_cov, min(0.5, 1 / (updates + 1))) if options["fast_start"] else lr_cov
