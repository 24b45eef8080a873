r"""Which products of rows make up the Gram matrix of patches, along one axis of stride 1.

Let U_h be row h of the padded input, unfolded along the other axes only. At position o, the kernel's offset p
meets row o + p (dilation makes that o + p * dilation), so that

    gram[p, q] = sum over o of U_{o+p} U_{o+q}^T = sum over h in [p, p + O) of U_h U_{h+q-p}^T.

Pairs (p, q) of the same difference sum the same products over almost the same range. They share one
large product; only the few rows at its ends, where the ranges differ, are multiplied apart. With k
offsets that makes about k products instead of k^2 (by symmetry (k^2 + k) / 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from singd.kernels.cpu_products import symmetric_share
from singd.kernels.patches import Window


class Product(NamedTuple):
    """The sum over rows h in [lo, hi) of U_h U_{h+shift}^T."""

    shift: int
    lo: int
    hi: int


@dataclass
class Plan:
    """The products, and where each of them belongs.

    Attributes:
        axis: The axis along which rows are shifted.
        products: All products to form.
        blocks: For each pair of offsets p <= q, the indices of the products that gram[p, q] sums.
    """

    axis: int
    products: list[Product]
    blocks: dict[tuple[int, int], list[int]]

    @property
    def rows(self) -> int:
        """The rows of all products together."""
        return sum(product.hi - product.lo for product in self.products)


def plan_products(window: Window, axis: int, n: int) -> Plan:
    """Plan the products along one axis, of stride 1, of which the padded input has n rows."""
    places, size, step = window.output_size(axis, n), window.size[axis], window.dilation[axis]
    plan = Plan(axis, [], {})
    for difference in range(size):
        starts = [p * step for p in range(size - difference)]  # of the range of each pair
        cuts = sorted({cut for start in starts for cut in (start, start + places)})
        for lo, hi in pairwise(cuts):
            users = [p for p, start in enumerate(starts) if start <= lo and hi <= start + places]
            for p in users:
                plan.blocks.setdefault((p, p + difference), []).append(len(plan.products))
            if users:
                plan.products.append(Product(difference * step, lo, hi))
    return plan


def cheapest_plan(window: Window, shape: tuple[int, ...]) -> Plan | None:
    """The plan for the axis where sharing products pays most, or None if it pays on none.

    Args:
        window: The window.
        shape: The padded input's, [B, C, *n].
    """
    batch, channels, *sizes = shape
    width = channels * window.numel
    places = [window.output_size(axis, n) for axis, n in enumerate(sizes)]
    # Multiplications, plainly and by each plan. All else was measured on a CPU and put in the same
    # unit: unfolding a number, starting a product, moving a number of the blocks to its place.
    unfolded = float(batch * width)
    for o in places:
        unfolded *= o
    best, least = None, unfolded * (width * symmetric_share(width) + 100)
    for axis in [i for i, stride in enumerate(window.stride) if stride == 1]:
        plan, k = plan_products(window, axis, sizes[axis]), window.size[axis]
        share = plan.rows / (places[axis] * k**2) if places[axis] else 1.0
        cost = unfolded * (share * width + 100 / k) + 3e6 * len(plan.products) + 50 * width**2
        if cost < least:
            best, least = plan, cost
    return best
