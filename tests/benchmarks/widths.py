"""What a structure costs against the width of a layer, its exponent, and where structures cross."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from timing import median_seconds

from singd.rows import DenseRows
from singd.rules.singd import moved_factor, riemannian_momenta
from singd.structures import StructuredMatrix, StructureSpec

WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096)
ROWS = 128  # of the batch


def random_factor(make: StructureSpec, d: int) -> StructuredMatrix:
    """A member near the identity with no zero entry that its structure does not ask for."""
    eye = make(d)
    return eye + eye.map(torch.randn_like) * (0.1 / d)


def update_work(make: StructureSpec, d: int) -> Callable[[], object]:
    """The statistics and the step of both factors of a layer with d inputs and d outputs."""
    a, g = torch.randn(ROWS, d), torch.randn(ROWS, d)
    K, C, m_K, m_C = (random_factor(make, d) for _ in range(4))

    def work() -> object:
        H_K, H_C = K.project_congruence(DenseRows(a)), C.project_congruence(DenseRows(g))
        new = riemannian_momenta(K, C, m_K, m_C, H_K, H_C, damping=1e-3, alpha1=0.5)
        return [moved_factor(A, m, 1e-2) for A, m in zip((K, C), new, strict=True)]

    return work


def gradient_work(make: StructureSpec, d: int) -> Callable[[], object]:
    """One side of a natural gradient: K K^T times ROWS vectors, without a cache.

    Not times d vectors: a d x d gradient leaves the cache at some d, and then it is memory that is measured.
    """
    K, X = random_factor(make, d), torch.randn(d, ROWS)
    return lambda: K.mm_AAt(X)


def seconds(make: StructureSpec, d: int) -> tuple[float, float]:
    """Of an update and of one side of a natural gradient."""
    return median_seconds(update_work(make, d)), median_seconds(gradient_work(make, d))


def fitted_exponent(widths: Sequence[float], costs: Sequence[float]) -> float:
    """The slope of log cost against log width, by least squares."""
    x, y = [math.log(w) for w in widths], [math.log(c) for c in costs]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def vector_cost(cost: str, d: float) -> float:
    """The registry's cost of a product with one vector, up to a constant."""
    if r"\log" in cost:
        return d * math.log(d)
    return d**2 if "d^2" in cost else d


def theoretical_exponents(make: StructureSpec, widths: Sequence[float]) -> tuple[float, float]:
    """The exponents of an update and of K K^T that the registry's cost promises.

    Both multiply ROWS vectors. To move a factor, an update also multiplies two of them: d vectors of a
    dense one, or as much as a few vectors of the others.
    """
    vector = [vector_cost(make.cost, w) for w in widths]
    dense = "d^2" in make.cost
    update = [v * (ROWS + (w if dense else 0)) for v, w in zip(vector, widths, strict=True)]
    return fitted_exponent(widths, update), fitted_exponent(widths, vector)


def crossing(
    widths: Sequence[float], costs: Sequence[float], others: Sequence[float]
) -> float | None:
    """From which width on ``costs`` stays below ``others``: interpolated between logarithms.

    Returns:
        The smallest width if it is below throughout, None if it is not at the largest.
    """
    gaps = [math.log(c / o) for c, o in zip(costs, others, strict=True)]
    if gaps[-1] >= 0:
        return None
    above = [i for i, gap in enumerate(gaps) if gap >= 0]
    if not above:
        return widths[0]
    i = above[-1]
    weight = gaps[i] / (gaps[i] - gaps[i + 1])
    return math.exp((1 - weight) * math.log(widths[i]) + weight * math.log(widths[i + 1]))
