r"""Which products of rows make up the Gram matrix of patches, along one axis.

Let U_h be row h of the input, unfolded along the other axes only. At position o, the kernel's offset p meets row
o * stride + p * dilation of the padded input. Without stride and dilation,

    gram[p, q] = sum over o of U_{o+p} U_{o+q}^T = sum over h in [p, p + O) of U_h U_{h+q-p}^T.

Pairs (p, q) of the same difference sum the same products over almost the same range. They share one
large product; only the few rows at its ends, where the ranges differ, are multiplied apart. With k
offsets that makes about k products instead of k^2 (by symmetry (k^2 + k) / 2). With a stride, the rows fall
into as many phases, each of which has stride 1 of its own. Rows that padding sets to zero are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations_with_replacement, pairwise
from typing import NamedTuple

from singd.kernels.cpu_products import symmetric_share
from singd.kernels.patches import Window


class Product(NamedTuple):
    """The sum over rows h in [lo, hi) of U_h V_{h+shift}^T.

    Attributes:
        U: The phase of the left rows.
        V: The phase of the right rows.
        shift: How far the right rows are ahead.
        lo: The first left row within its phase.
        hi: The end of the left rows.
    """

    U: int
    V: int
    shift: int
    lo: int
    hi: int

    @property
    def symmetric(self) -> bool:
        """Whether it is of rows with themselves, so that half of it will do."""
        return self.U == self.V and self.shift == 0


@dataclass
class Plan:
    """The products, and where each of them belongs.

    Attributes:
        axis: The axis along which rows are shifted.
        inside: The rows of the padded axis that are not known to be zero.
        products: All products to form.
        blocks: For each pair of offsets p <= q, the indices of the products that gram[p, q] sums.
    """

    axis: int
    inside: slice
    products: list[Product]
    blocks: dict[tuple[int, int], list[int]]

    @property
    def phases(self) -> set[int]:
        """The phases whose rows are needed."""
        return {phase for product in self.products for phase in (product.U, product.V)}

    def work(self, width: int) -> float:
        """The rows to multiply, for products of this width: fewer where half of one will do."""
        half = symmetric_share(width)
        return sum((p.hi - p.lo) * (half if p.symmetric else 1.0) for p in self.products)


def plan_products(window: Window, axis: int, n: int, zeros: tuple[int, int] = (0, 0)) -> Plan:
    """Plan the products along one axis, of which the padded input has n rows.

    Args:
        window: The window.
        axis: One of its axes.
        n: The size of the padded input along it.
        zeros: How many rows at its start and its end are known to be zero.
    """
    (before, after), stride = zeros, window.stride[axis]
    places, offsets = window.output_size(axis, n), range(window.size[axis])
    # At position o, offset p meets row start + o of its phase, not counting the zeros before.
    meets = [divmod(p * window.dilation[axis] - before, stride) for p in offsets]
    length = [len(range(phase, n - before - after, stride)) for phase in range(stride)]
    families: dict[tuple[int, int, int], dict[tuple[int, int], tuple[int, int]]] = {}
    for p, q in combinations_with_replacement(offsets, 2):
        (start, U), (other, V) = meets[p], meets[q]
        shift = other - start
        # where both rows are in the input; elsewhere one of them is zero
        lo = max(start, 0, -shift)
        hi = min(start + places, length[U], length[V] - shift)
        if lo < hi:
            families.setdefault((U, V, shift), {})[p, q] = lo, hi
    plan = Plan(axis, slice(before, n - after), [], {})
    for family, ranges in families.items():
        for lo, hi in pairwise(sorted({cut for both in ranges.values() for cut in both})):
            users = [pair for pair, (a, b) in ranges.items() if a <= lo and hi <= b]
            for pair in users:
                plan.blocks.setdefault(pair, []).append(len(plan.products))
            if users:
                plan.products.append(Product(*family, lo, hi))
    return plan


def cheapest_plan(
    window: Window, shape: tuple[int, ...], zeros: list[tuple[int, int]]
) -> Plan | None:
    """The plan for the axis where sharing products pays most, or None if it pays on none.

    Args:
        window: The window.
        shape: The padded input's, [B, C, *n].
        zeros: For each axis, how many rows at its start and its end are known to be zero.
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
    for axis, n in enumerate(sizes):
        plan, k = plan_products(window, axis, n, zeros[axis]), window.size[axis]
        share = plan.work(width // k) / (places[axis] * k**2) if places[axis] else 1.0
        cost = unfolded * (share * width + 100 / k) + 3e6 * len(plan.products) + 50 * width**2
        if cost < least:
            best, least = plan, cost
    return best
