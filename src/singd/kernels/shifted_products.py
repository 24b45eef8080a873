r"""Which products of rows make up the Gram matrix of patches, along one axis.

Let U_h be row h of the input, unfolded along the other axes only. At position o, the kernel's
offset p meets row o * stride + p * dilation, so that without stride and dilation

    gram[p, q] = sum over o of U_{o+p} U_{o+q}^T = sum over h in [p, p + O) of U_h U_{h+q-p}^T.

Pairs (p, q) of the same difference sum the same products over almost the same range. They share one
large product; only the few rows at its ends, where the ranges differ, are multiplied apart. With k
offsets that makes about k products instead of k^2 (by symmetry (k^2 + k) / 2). With a stride, the
rows fall into as many phases, each of which has stride 1 of its own.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations_with_replacement, pairwise
from typing import NamedTuple

from singd.kernels.cpu_products import symmetric_share
from singd.kernels.patches import Window


class Product(NamedTuple):
    """The sum over h in [lo, hi) of U_h V_{h+shift}^T.

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
        before: How many rows at the start of the padded axis are zero, and left out.
        after: How many at its end.
        products: All products to form.
        blocks: For each pair of offsets p <= q, the indices of the products that gram[p, q] sums.
    """

    axis: int
    before: int
    after: int
    products: list[Product]
    blocks: dict[tuple[int, int], list[int]]

    @property
    def phases(self) -> set[int]:
        """The phases whose rows are needed."""
        return {phase for product in self.products for phase in (product.U, product.V)}

    @property
    def rows(self) -> int:
        """The rows of all products together."""
        return sum(product.hi - product.lo for product in self.products)

    def work(self, width: int) -> float:
        """The rows to multiply, for products of this width: fewer where half of one will do."""
        half = symmetric_share(width)
        return sum((p.hi - p.lo) * (half if p.symmetric else 1.0) for p in self.products)


def plan_products(window: Window, axis: int, n: int, zeros: tuple[int, int]) -> Plan:
    """Plan the products along one axis.

    Args:
        window: The window.
        axis: One of its axes.
        n: The size of the padded input along it.
        zeros: How many rows at its start and its end are known to be zero.
    """
    before, after = zeros
    positions, stride = window.output_size(axis, n), window.stride[axis]
    # At position o, offset p meets row start + o of its phase, not counting the zeros before.
    meets = [divmod(p * window.dilation[axis] - before, stride) for p in range(window.size[axis])]
    length = [len(range(phase, n - before - after, stride)) for phase in range(stride)]

    families = defaultdict(list)
    for p, q in combinations_with_replacement(range(window.size[axis]), 2):
        (start, U), (other_start, V) = meets[p], meets[q]
        families[U, V, other_start - start].append((p, q, start))

    plan = Plan(axis, before, after, [], {})
    for (U, V, shift), members in families.items():
        # Where both rows are in the input; elsewhere one of them is zero.
        first, end = max(0, -shift), min(length[U], length[V] - shift)
        ranges = {
            (p, q): (max(start, first), min(start + positions, end)) for p, q, start in members
        }
        ranges = {pair: (lo, hi) for pair, (lo, hi) in ranges.items() if lo < hi}
        cuts = sorted({cut for lo_hi in ranges.values() for cut in lo_hi})
        plan.blocks |= {pair: [] for pair in ranges}
        for lo, hi in pairwise(cuts):
            users = [pair for pair, (a, b) in ranges.items() if a <= lo and hi <= b]
            if users:
                for pair in users:
                    plan.blocks[pair].append(len(plan.products))
                plan.products.append(Product(U, V, shift, lo, hi))
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
    positions = [window.output_size(axis, n) for axis, n in enumerate(sizes)]
    # Multiplications, plainly and by each plan. All else was measured on a CPU and put in the same
    # unit: unfolding a number, starting a product, moving a number of the blocks to its place.
    unfolded = float(batch * width)
    for o in positions:
        unfolded *= o
    whole, best = unfolded * width, None
    least = whole * symmetric_share(width) + 100 * unfolded
    for axis, n in enumerate(sizes):
        plan = plan_products(window, axis, n, zeros[axis])
        share = plan.work(width // window.size[axis]) / (positions[axis] * window.size[axis] ** 2)
        cost = (
            share * whole
            + 100 * unfolded / window.size[axis]
            + 3e6 * len(plan.products)
            + 50 * width**2
        )
        if cost < least:
            least, best = cost, plan
    return best
