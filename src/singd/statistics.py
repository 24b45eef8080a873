"""Sums and counts of what backward passes say about one layer, and their normalisation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from singd.precision import wide_dtype
from singd.rows import Rows
from singd.rules import Curvature, Factors, Rule
from singd.structures import StructuredMatrix


@dataclass(eq=False)
class Statistics:
    """Sums over the backward passes since the last step.

    Attributes:
        H_K: What the rule makes of the rows A of layer inputs, summed over them: P(K^T A^T A K).
        H_C: What it makes of the rows B of output gradients: P(C^T B^T B C).
        u: The trace of A^T A over d_i, 0-d; zero where no option needs it.
        g: The trace of B^T B over d_o, 0-d.
        rows: How many rows A had, a 0-d tensor.
        terms: How many loss terms the loss averaged over (1 if it did not), a 0-d tensor.
        backward: The number of the backward pass that added last.
        calls: How many calls of the layer added in that pass.
        most: The most terms of one of them.
        over: Whether that pass has ended.
    """

    H_K: StructuredMatrix
    H_C: StructuredMatrix
    u: Tensor
    g: Tensor
    rows: Tensor
    terms: Tensor
    backward: int = -1
    over: bool = False
    calls: int = 1
    most: Tensor | float = 0.0

    def normalised(self, averaged: bool = True) -> tuple[Curvature, Tensor | bool]:
        """Means over rows, the averaging of the loss undone, and whether there was anything.

        Args:
            averaged: Whether the loss averages; else it does not, however many passes there were.
        """
        one, terms = 1.0 / self.rows.clamp(min=1.0), self.terms
        terms = terms if averaged else terms.clamp(max=1.0)
        curvature = Curvature(self.H_K * one, self.H_C * terms, self.u * one, self.g * terms)
        some = self.rows > 0
        return curvature, bool(some) if some.device.type == "cpu" else some

    def __add__(self, new: Statistics) -> Statistics:
        """Both together, in float32 at least: in bfloat16 a sum over many micro-batches would stall."""
        H_K, H_C = (
            old.to(dtype=wide_dtype(old.dtype)) + more.to(dtype=wide_dtype(more.dtype))
            for old, more in ((self.H_K, new.H_K), (self.H_C, new.H_C))
        )
        numbers = {n: getattr(self, n) + getattr(new, n) for n in ("u", "g", "rows", "terms")}
        return replace(new, H_K=H_K, H_C=H_C, **numbers)

    def follows(self, old: Statistics, positions: bool) -> None:
        """Be those of one more call in the pass that added to the old ones last.

        Args:
            old: The statistics that these are added to.
            positions: Whether both calls are positions of the same examples, whose batch is counted once.
        """
        self.calls = old.calls + 1
        if positions:
            most = torch.maximum(torch.as_tensor(old.most), self.terms)
            self.terms, self.most = most - old.most, most


def gathered(
    rule: Rule, factors: Factors, a: Rows, g: Rows, terms: int, options: Mapping[str, Any]
) -> Statistics:
    """The statistics of one backward pass through one layer.

    A contribution that is not finite is replaced by nothing, decided without waiting for the device: one bad
    batch, or an overflow under a gradient scaler, spoils neither the factors nor the good batches beside it.

    Args:
        rule: The rule that moves the factors.
        factors: What it gathers with.
        a: Rows of inputs, ``[m, d_i]``.
        g: Rows of output gradients, ``[m, d_o]``.
        terms: How many terms the loss averages over.
        options: The parameter group's.
    """
    H_K, H_C = rule.curvature(factors, a, g)
    wide = torch.promote_types(wide_dtype(H_K.dtype), H_C.dtype)
    if options["relative_damping"] or options["scaled_start"]:
        traces = [rows.squares().sum(dtype=wide) / rows.width for rows in (a, g)]
    else:
        traces = [torch.zeros((), dtype=wide, device=H_K.device)] * 2
    # both are positive semi-definite, so that no entry exceeds the trace, and no trace is negative
    finite = (H_K.trace() + H_C.trace() + traces[0] + traces[1]).abs() < math.inf
    if finite.device.type != "cpu" or not finite:  # only on a CPU it costs nothing to look
        for t in (*H_K.tensors(), *H_C.tensors(), *traces):
            t.masked_fill_(~finite, 0.0)
    seen = finite.to(wide)
    counted = seen * (terms if a.count else 0)
    u, g_trace = traces
    return Statistics(H_K, H_C, u, g_trace, seen * a.count, counted, most=counted)
